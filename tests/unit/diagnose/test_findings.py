"""A finding: the wrong operation, captured again with everything around it, and its diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.diagnose import findings
from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.diagnose.findings import Finding
from crossval.diagnose.probing import LENGTHS
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord, TapArray
from tests.support.strangers import Fault, Stranger

PLANS = [PassPlan("prefill", (1, 17, 42, 250, 3), 0), *(PassPlan("decode", (11 + i,), 5 + i) for i in range(5))]

IN_LAYER = [name for name in taps.of_model(2) if name.startswith("blk.1.")]


class Watched(Stranger):
    """A stranger that records its requests, changes arrays, and may give only some taps."""

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


def find(engine: Watched, make_model: Callable[..., Path], max_bytes: int | None = None) -> Finding | None:
    weights = SpecWeights(make_model())
    source = Capture(engine, weights.config, PLANS, max_bytes=max_bytes)
    (result,) = audit([source], weights)
    engine.asked = []
    return findings.find("candidate", source, result, weights)


def test_a_clean_engine_has_no_finding_and_runs_no_more(engine: Watched, make_model: Callable[..., Path]) -> None:
    assert find(engine, make_model) is None
    assert engine.asked == []


def relu(index: int, name: str, tap: TapArray) -> TapArray | None:
    """ReLU without its square, in layer 1, from the second decoded token on."""
    return TapArray(np.sqrt(tap.array), tap.rows) if name == "blk.1.ffn_act" and index >= 2 else None


def test_nothing_runs_again_for_what_is_held(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = relu
    found = find(engine, make_model)
    assert found is not None
    assert engine.asked == []


def test_the_cause_is_named_and_the_run_is_small(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = relu
    found = find(engine, make_model, max_bytes=1)
    assert found is not None
    assert (found.check.tap, found.check.pass_index, found.diagnosis.name) == ("blk.1.ffn_act", 2, "plain ReLU")
    assert found.context is not None
    assert (found.context.plan, found.context.op.output) == (PLANS[2], "blk.1.ffn_act")
    # layer, what it reads, the same operation elsewhere; up to the last of the passes that are diagnosed together
    elsewhere = [f"blk.{i}.{tap}" for i in range(2) for tap in ("k_rope", "v", "ffn_gate", "ffn_act")]
    names = frozenset(["blk.0.l_out", *IN_LAYER, *elsewhere])
    assert engine.asked == [(index, names) for index in range(2 + findings.MAX_PASSES)]


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("inp_embd", ["inp_embd"]),
        ("blk.0.q", ["inp_embd", *(name.replace("1", "0", 1) for name in IN_LAYER)]),
        ("result_norm", ["blk.0.l_out", *IN_LAYER, "result_norm", "result_output"]),
    ],
)
def test_what_is_captured(tap: str, expected: list[str], make_model: Callable[..., Path]) -> None:
    assert findings._names(tap, SpecWeights(make_model()).config) == expected


def test_other_layers_are_captured_only_while_memory_allows(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SpecWeights(make_model()).config
    (op,) = (op for op in op_table(config) if op.output == "blk.0.kq_soft_max")
    assert set(findings._elsewhere(op, config, PLANS)) == {
        f"blk.{i}.{tap}" for i in range(config.n_layers) for tap in ("k_rope", "v", "kq", "kq_soft_max")
    }
    n_tokens = sum(len(plan.token_ids) for plan in PLANS)
    widest = max(config.hidden_dim, config.n_heads * n_tokens)
    monkeypatch.setattr(findings, "MAX_BYTES", 4 * config.n_layers * n_tokens * widest * 4 - 1)
    assert findings._elsewhere(op, config, PLANS) == []


def test_one_cause_has_to_explain_both_kinds_of_pass(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = lambda index, name, tap: (
        TapArray(tap.array * np.float32(2), tap.rows) if name == "blk.0.ffn_out" else None
    )
    found = find(engine, make_model, max_bytes=1)
    assert found is not None
    assert [index for index, _ in engine.asked] == [0, 1, 2, 3]
    assert (found.check.pass_index, found.check.tap) == (0, "blk.0.ffn_out")


def zeroed(limit: Callable[[int], int]) -> Callable[[int, str, TapArray], TapArray | None]:
    """Return a change that zeroes the tokens of layer 0's q from a limit on, which may depend on their number."""

    def change(index: int, name: str, tap: TapArray) -> TapArray | None:
        array, n = tap.array.copy(), tap.array.shape[0]
        if name != "blk.0.q" or n == 1:
            return None
        array[limit(n) :] = 0
        return TapArray(array, tap.rows)

    return change


@pytest.mark.parametrize(
    ("limit", "name"),
    [(lambda n: 4, "tokens from 4 on zero"), (lambda n: n // 4 * 4, "last n mod 4 tokens zero")],
)
def test_more_prompts_of_a_live_engine_tell_causes_apart(
    engine: Watched, make_model: Callable[..., Path], limit: Callable[[int], int], name: str
) -> None:
    """Of five tokens the fifth is zero: beyond a limit of four, or left over after a group of four."""
    engine.change = zeroed(limit)
    found = find(engine, make_model)
    assert found is not None
    assert (found.check.tap, found.diagnosis.name) == ("blk.0.q", name)


@pytest.mark.parametrize("in_the_head", [True, False])
def test_a_tied_head_tells_a_table_without_rows_from_tokens_that_were_not_written(
    engine: Watched, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, in_the_head: bool
) -> None:
    """Ids from 200 on: one token of the prompt, 250; the LM head uses the same table, or a copy."""

    def change(index: int, name: str, tap: TapArray) -> TapArray | None:
        if name == "inp_embd":
            gone = [token >= 200 for token in PLANS[index].token_ids]
            return TapArray(np.where(np.asarray(gone)[:, None], np.float32(0), tap.array), tap.rows)
        if name == "result_output" and in_the_head:
            array = tap.array.copy()
            array[:, 200:] = 0.0
            return TapArray(array, tap.rows)
        return None

    engine.change = staticmethod(change)
    monkeypatch.setattr(Watched, "status", "recorded")  # no more prompts
    found = find(engine, make_model)
    assert found is not None
    assert found.check.tap == "inp_embd"
    names = {one.name for one in found.diagnosis.candidates}
    table = {name for name in names if "embedding rows" in name or "token ids" in name}
    assert table
    assert (names == table) == in_the_head


def test_lengths_of_the_prompts_differ_in_what_is_left_over() -> None:
    left = {group: tuple(n % group if n >= group else 0 for n in LENGTHS) for group in (2, 4, 8, 16, 32)}
    assert len(set(left.values())) == len(left)


def test_a_recording_cannot_be_asked_for_more(engine: Watched, make_model: Callable[..., Path]) -> None:
    engine.change = zeroed(lambda n: 4)
    engine.status = "recorded"  # type: ignore[assignment]
    found = find(engine, make_model)
    assert found is not None
    assert found.diagnosis.name == "token 4 zero"
    assert [one.name for one in found.diagnosis.candidates] == [
        "tokens from 4 on zero",
        "last n mod 2 tokens zero",
        "last n mod 4 tokens zero",
    ]


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
    engine.fault, engine.only = Fault(rolled_from="1/ffn_sub_norm"), taps.of_model(2, outline=True)
    found = find(engine, make_model)
    assert found is not None
    data = findings.to_json(found, "command")
    assert (data["tap"], data["name"], data["segment_ops"]) == ("blk.1.l_out", UNDETERMINED, [])
    assert data["explanation"] == (
        "no single known bug in the 20 operations judged as one explains it; "
        "record every tap of layer 1 to find the cause"
    )
    assert data["specification_ratio"] > 0.1
    segment = {"first_layer": 1, "last_layer": 1, "first_op": "blk.1.attn_norm"}
    assert data["segment"] == {**segment, "record": IN_LAYER[:-1]}


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
