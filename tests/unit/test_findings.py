"""A finding: the guilty operation captured again with what surrounds it, and what its diagnosis says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from strangers import Fault, Stranger

from crossval import findings, taps
from crossval.audit.run import audit
from crossval.diagnose import UNDETERMINED
from crossval.findings import Finding
from crossval.runners.base import PassPlan, PassRecord, TapArray
from crossval.spec_weights import SpecWeights

PLANS = [PassPlan("prefill", (1, 17, 42, 250, 3), 0), *(PassPlan("decode", (11 + i,), 5 + i) for i in range(5))]


class Watched(Stranger):
    """A stranger that keeps what it was asked for, changes arrays, and may give only some taps."""

    change: Callable[[int, str, TapArray], TapArray | None] | None = None
    only: Collection[str] | None = None

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        assert self._cache is not None
        index = [plan.start for plan in PLANS].index(self._cache.n_tokens)
        self.asked = [*getattr(self, "asked", []), (index, frozenset(select))]
        record = super().eval(token_ids, [name for name in select if self.only is None or name in self.only])
        given = dict(record.taps)
        for name, tap in record.taps.items():
            changed = self.change(index, name, tap) if self.change else None
            given[name] = tap if changed is None else changed
        return PassRecord(record.plan, given)


@pytest.fixture
def engine(make_model: Callable[..., Path]) -> Iterator[Watched]:
    with Watched(make_model(), n_threads=1) as runner:
        yield runner


def find(engine: Watched, make_model: Callable[..., Path]) -> Finding | None:
    weights = SpecWeights(make_model())
    (result,) = audit([engine], PLANS, weights)
    engine.asked = []
    return findings.find("candidate", engine, result, PLANS, weights)


def test_a_clean_engine_has_no_finding_and_runs_no_more(engine: Watched, make_model: Callable[..., Path]) -> None:
    assert find(engine, make_model) is None
    assert engine.asked == []


def relu(index: int, name: str, tap: TapArray) -> TapArray | None:
    """ReLU without its square, in layer 1, from the second decoded token on."""
    return TapArray(np.sqrt(tap.array), tap.rows) if name == "blk.1.ffn_act" and index >= 2 else None


def test_the_cause_is_named_and_the_run_is_small(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = relu
    found = find(engine, make_model)
    assert found is not None
    assert (found.check.tap, found.check.pass_index, found.diagnosis.name) == ("blk.1.ffn_act", 2, "plain ReLU")
    assert found.context is not None
    assert (found.context.plan, found.context.op.output) == (PLANS[2], "blk.1.ffn_act")
    # the layer and what it reads, up to the last of the passes that are diagnosed together
    names = frozenset(["blk.0.l_out", *taps.layer_taps(1)])
    assert engine.asked == [(index, names) for index in range(2 + findings.MAX_PASSES)]


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("inp_embd", ["inp_embd"]),
        ("blk.0.q", ["inp_embd", *taps.layer_taps(0)]),
        ("result_norm", ["blk.0.l_out", *taps.layer_taps(1), *taps.HEAD_TAPS]),
    ],
)
def test_what_is_captured(tap: str, expected: list[str], make_model: Callable[..., Path]) -> None:
    assert findings._names(tap, SpecWeights(make_model()).config) == expected


def test_one_cause_has_to_explain_both_kinds_of_pass(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = lambda index, name, tap: (
        TapArray(tap.array * np.float32(2), tap.rows) if name == "blk.0.ffn_out" else None
    )
    found = find(engine, make_model)
    assert found is not None
    assert [index for index, _ in engine.asked] == [0, 1, 2, 3]
    assert (found.check.pass_index, found.check.tap) == (0, "blk.0.ffn_out")


def test_values_that_are_not_finite_are_diagnosed_too(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.fault = Fault(invalid="blk.1.kq_soft_max")
    found = find(engine, make_model)
    assert found is not None
    assert (found.check.status, found.diagnosis.name) == ("invalid", UNDETERMINED)
    assert found.context is not None


def test_a_wrong_shape_is_its_own_explanation(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = lambda index, name, tap: (
        TapArray(tap.array[:, :-1].copy(), tap.rows) if name == "blk.0.ffn_up" else None
    )
    found = find(engine, make_model)
    assert found is not None
    assert found.context is None
    assert found.diagnosis.name == UNDETERMINED
    assert "shape (5, 255)" in found.diagnosis.explanation
    assert engine.asked == []


def test_operations_judged_as_one_say_what_to_record(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.fault, engine.only = Fault(rolled_from="1/ffn_sub_norm"), taps.outline_taps(2)
    found = find(engine, make_model)
    assert found is not None
    data = findings.to_json(found, "command")
    assert (data["tap"], data["name"], data["segment_ops"]) == ("blk.1.l_out", UNDETERMINED, [])
    assert data["explanation"] == (
        "no one known mistake in the 20 operations judged as one explains it; "
        "record every tap of layer 1 to find the cause"
    )
    assert data["specification_ratio"] > 0.1
    segment = {"first_layer": 1, "last_layer": 1, "first_op": "blk.1.attn_norm"}
    assert data["segment"] == {**segment, "record": taps.layer_taps(1)[:-1]}


def test_a_finding_as_json(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = relu
    found = find(engine, make_model)
    assert found is not None
    data = findings.to_json(found, "crossval ...")
    cause = {
        "name": "plain ReLU",
        "family": "feed-forward",
        "explanation": "plain ReLU instead of squared ReLU",
    }
    assert {name: data[name] for name in cause} == cause
    assert data["candidates"] == [cause]
    assert (data["party"], data["layer"], data["op"], data["pass_kind"]) == ("candidate", 1, "ffn_act", "decode")
    assert data["ratio"] * 10 < data["specification_ratio"]
    assert data["command"] == "crossval ..."
