"""How a deviation without a name is described: positions of the sequence, heads, features, factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossval.diagnose.variants.context import Context, of_records
from crossval.diagnose.variants.pattern import describe
from crossval.engines.spec import SpecRunner
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord

PLANS = [PassPlan("prefill", (1, 17, 42, 250), 0), PassPlan("prefill", (3, 99, 8), 4)]
Change = Callable[[np.ndarray], None]


@pytest.fixture(scope="module")
def records(make_model: Callable[..., Path]) -> Iterator[tuple[SpecWeights, list[PassRecord]]]:
    path = make_model(n_heads=4, n_kv_heads=2)
    with SpecRunner(path) as runner:
        weights = SpecWeights(path)
        names = taps.of_model(weights.config.n_layers)
        yield weights, [runner.eval(plan.token_ids, names) for plan in PLANS]


def context(records: tuple[SpecWeights, list[PassRecord]], tap: str, change: Change) -> Context:
    weights, passes = records
    (op,) = (op for op in op_table(weights.config) if op.output == tap)
    found = of_records(op, passes, weights.config, weights, index=1)
    array = found.recorded.copy()
    change(array)
    return replace(found, recorded=array)


def scale(at: object, factor: float) -> Change:
    def change(array: np.ndarray) -> None:
        array[at] *= np.float32(factor)  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    ("tap", "change", "said"),
    [
        ("blk.0.ffn_act", scale(..., 2), "the output is 2 times what it should be"),
        ("blk.0.ffn_norm", scale(1, 3), "tokens are multiplied: by 3 at position 5"),
        ("blk.0.ffn_up", scale(slice(1, None), 0.5), "tokens are multiplied: by 0.5 at positions 5-6"),
        ("blk.0.q", scale((slice(None), 2), 2), "heads are multiplied: by 2 at head 2"),
        ("blk.0.kqv_out", scale((slice(None), slice(64, 128)), 2), "heads are multiplied: by 2 at heads 2-3"),
        ("blk.0.kq", scale((3, slice(None)), 2), "heads are multiplied: by 2 at head 3"),
        ("blk.0.v", scale((0, 1, 5), 2), "only position 4, head 1, feature 5 deviate"),
        ("blk.0.k_rope", scale((slice(None), slice(None), slice(16, 32)), -1), "only features 16-31 deviate"),
        ("blk.0.kq_soft_max", scale((1, 2, slice(2, 4)), 2), "only position 6, head 1, keys 2-3 deviate"),
        (
            "blk.0.l_out",
            scale(([0, 2], [3, 9]), 2),
            "only 2 of 3 positions (first 4, 6), 2 of 128 features (first 3, 9)",
        ),
        ("blk.0.l_out", scale((1, 3), np.nan), "1 of 384 values are not finite, position 5"),
    ],
)
def test_what_deviates_is_said_by_position_head_and_factor(
    records: tuple[SpecWeights, list[PassRecord]], tap: str, change: Change, said: str
) -> None:
    assert describe(context(records, tap, change)).startswith(said)


def test_tokens_with_factors_of_their_own(records: tuple[SpecWeights, list[PassRecord]]) -> None:
    def change(array: np.ndarray) -> None:
        array *= np.array([[1], [0.5], [0.25]], np.float32)

    said = "tokens are multiplied: by 0.25 at position 6; by 0.5 at position 5"
    assert describe(context(records, "blk.1.attn_o_out", change)) == said


def test_a_right_output_deviates_nowhere(records: tuple[SpecWeights, list[PassRecord]]) -> None:
    said = describe(context(records, "blk.0.q", lambda array: None))
    assert said == "no value deviates by more than 1e-05 of its token's size"
