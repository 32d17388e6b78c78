"""A mistake between recorded tensors is named from the next recorded one, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from faulty_engine import FAULTS, FaultyRunner

from crossval import findings, taps
from crossval.audit.bounds import Arithmetic
from crossval.audit.run import audit
from crossval.diagnose import UNDETERMINED, Diagnosis
from crossval.ops import op_table
from crossval.replay import HeldWeights, Replay
from crossval.runners.base import PassRecord
from crossval.runners.recorded import RecordedRunner
from crossval.segment_diagnosis import diagnose_segment
from crossval.spec_weights import SpecWeights

SWIGLU = Path(__file__).parent.parent / "data" / "gen2-swiglu"
NAMES = {
    "no attention sub-norm": "norm skipped",
    "no feed-forward sub-norm": "norm skipped",
    "SiLU": "SiLU",
    "gate and up swapped": "activation on up",
    "RoPE base 10000": "RoPE base 10000",
    "no score scale": "no scale",
    "four codes in a row": "codes read four in a row",
    "LayerNorm": "LayerNorm",
    "another norm's weight": "norm weight of blk.{layer}.ffn_norm.weight",
    "mask sees the next": "mask off by one: a token sees the next",
    "128 levels": "128 levels instead of 127",
    "float activations": "no activation quantisation",
    "truncation": "truncation",
    "no attention residual": "residual skipped",
    "no feed-forward residual": "residual skipped",
}
"""What the variants call each fault of the engine."""


@pytest.fixture(scope="module")
def weights(shipped_model: Path) -> SpecWeights:
    return SpecWeights(shipped_model)


def test_a_fused_swiglu_with_the_wrong_activation_is_named(weights: SpecWeights) -> None:
    """What bitnet.cpp has done since July 2026: one operation for activation and product, SiLU in it."""
    with RecordedRunner(SWIGLU) as runner:
        (result,) = audit([runner], runner.plan, weights)
        found = findings.find("candidate", runner, result, runner.plan, weights)
    assert found is not None
    assert (found.check.tap, found.check.n_ops) == ("blk.0.ffn_out", 2)
    data = findings.to_json(found, "crossval ...")
    assert (data["name"], data["op"], data["segment_ops"]) == ("SiLU", "ffn_out", ["blk.0.ffn_act"])
    assert data["explanation"] == (
        "SiLU instead of squared ReLU (ffn_act, inside the segment that ends in ffn_out)"
    )
    assert data["ratio"] < 1e-6
    assert data["specification_ratio"] > 0.5


def tokens(n: int, seed: int) -> list[int]:
    return [1019, *np.random.default_rng(seed).integers(0, 1000, n - 1).tolist()]


def diagnosed(
    weights: SpecWeights, engine: FaultyRunner, tap: str, passes: Sequence[Sequence[int]], guilty: Sequence[int]
) -> Diagnosis:
    """Diagnose the segment that ends in ``tap`` in some passes of an engine that records only outlines."""
    outline = taps.outline_taps(weights.config.n_layers)
    records: list[PassRecord] = [engine.eval(ids, outline) for ids in passes]
    held, arithmetic = HeldWeights(weights), Arithmetic(engine.identity.numerics, weights.config.n_heads)
    table = op_table(weights.config)
    return diagnose_segment(
        [Replay(table, weights.config, held, records[: i + 1], tap, arithmetic) for i in guilty], arithmetic
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_one_layers_output_is_enough_for_the_name(fault: str, weights: SpecWeights, shipped_model: Path) -> None:
    layer, n = (2, 45) if fault in ("SiLU", "LayerNorm", "128 levels") else (0, 5)
    engine = FaultyRunner(shipped_model, fault, {layer})
    found = diagnosed(weights, engine, f"blk.{layer}.l_out", [tokens(n, 1)], [0])
    if fault == "truncation":  # thousands of values lie a rounding from an integer: most tokens are off by flips
        assert found.name in (UNDETERMINED, NAMES[fault])
        return
    assert found.name == NAMES[fault].format(layer=layer), found.explanation
    assert found.ratio is not None
    assert found.ratio < 2e-6
    assert found.specification_ratio > 1e-3
    assert found.segment_ops[0] == f"blk.{layer}.{FAULTS[fault]}"
