"""What is captured in which run, what is held, and what two runs must agree in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest

from crossval.audit.altered import Altered
from crossval.capture import Capture, Feed, groups, run, stages
from crossval.model import taps
from crossval.passes import PassPlan, PassRecord, TapArray
from crossval.terms import LOGITS
from tests.support.numpy_engine import CONFIG, NumpyRunner

PLANS = (PassPlan("prefill", (3, 14, 15), 0), PassPlan("decode", (9,), 3))
OUTLINE = frozenset(taps.of_model(3, outline=True))
MODEL_TAPS = frozenset(taps.of_model(3))


def asked(engine: NumpyRunner) -> list[frozenset[str]]:
    """Return what each run asked for, apart from the outline."""
    return [select - OUTLINE for tokens, select in engine.evals if tokens == PLANS[0].token_ids]


def whole_layers(*layers: int) -> frozenset[str]:
    return frozenset(name for layer in layers for name in taps.layer_taps(layer) if name in MODEL_TAPS) - OUTLINE


def test_groups_are_as_large_as_fits_and_never_empty() -> None:
    assert list(groups([3, 4, 9, 1, 1], int, 7)) == [[3, 4], [9], [1, 1]]
    assert list(groups([], int, 7)) == []


def test_records_are_what_the_engine_gives() -> None:
    names = ["blk.1.kq", "result_norm"]
    expected = run(NumpyRunner(), [plan.token_ids for plan in PLANS], names)
    for max_bytes in (None, 1):
        found = Capture(NumpyRunner(), CONFIG, PLANS, max_bytes=max_bytes).records(names)
        assert [record.plan for record in found] == list(PLANS)
        for ours, theirs in zip(found, expected, strict=True):
            assert list(ours.taps) == names
            assert all(np.array_equal(ours.taps[name].array, theirs.taps[name].array) for name in names)


def test_what_is_held_is_not_run_for_again() -> None:
    engine = NumpyRunner(lacks=["blk.0.kq"])
    capture = Capture(engine, CONFIG, PLANS)
    for _ in range(2):
        for stage in stages(CONFIG):
            capture.records(stage, ahead=True)
        assert [*capture.records(["blk.0.kq", "blk.2.v"], 1)[0].taps] == ["blk.2.v"]
    assert asked(engine) == [whole_layers(0, 1, 2)]


def test_short_of_memory_layers_are_captured_in_groups_and_let_go() -> None:
    engine = NumpyRunner()
    two_layers = 6000
    capture = Capture(engine, CONFIG, PLANS, max_bytes=two_layers)
    for stage in stages(CONFIG):
        assert set(capture.records(stage, ahead=True)[1].taps) == set(stage)
    first, second = asked(engine)
    assert first == whole_layers(0, 1)
    assert second == whole_layers(2)
    capture.records(["blk.0.v", "blk.2.v"], 1)
    assert engine.evals[-1] == (PLANS[0].token_ids, {"blk.0.v"})


@pytest.mark.parametrize(("status", "n_runs"), [("live", 2), ("recorded", 1)])
def test_a_live_engine_shows_its_outline_twice(status: str, n_runs: int) -> None:
    engine = NumpyRunner()
    engine.status = status  # type: ignore[assignment]
    capture = Capture(engine, CONFIG)
    feed = Feed(PLANS[0].token_ids, 1, PLANS)
    capture.start(feed.expected)
    while (plan := feed.next_plan(None)) is not None:
        assert set(capture.extend(plan).taps) == OUTLINE
    for stage in stages(CONFIG):
        capture.records(stage, ahead=True)
    runs = asked(engine)
    assert len(runs) == n_runs
    assert frozenset().union(*runs) == whole_layers(0, 1, 2)
    assert sum(map(len, runs)) == len(whole_layers(0, 1, 2))
    assert capture.plans == list(PLANS)


class Moody(NumpyRunner):
    """Gives other numbers in every run, in one row of one tensor; and more rows when asked for more tensors."""

    runs = 0

    def reset(self) -> None:
        super().reset()
        self.runs += 1

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = super().eval(token_ids, select)
        given = dict(record.taps)
        if "blk.1.l_out" in given and len(token_ids) > 1:
            given["blk.1.l_out"].array[2, 0] += self.runs
        if LOGITS in given and self.runs == 2:
            logits = given[LOGITS].array
            given[LOGITS] = TapArray(np.concatenate([logits + 1] * (len(token_ids) - 1) + [logits]))
        return replace(record, taps=given)


def test_runs_that_differ_are_noticed_row_by_row() -> None:
    capture = Capture(Moody(), CONFIG, PLANS, max_bytes=1)
    capture.records(["blk.0.v"], ahead=True)
    assert capture.unsteady == set()
    capture.records(["blk.1.v"], ahead=True)
    assert capture.unsteady == {(0, "blk.1.l_out")}
    capture.note([PassRecord(PLANS[0], {LOGITS: TapArray(np.ones((1, CONFIG.vocab_size), np.float32), (2,))})])
    assert capture.unsteady == {(0, "blk.1.l_out"), (0, LOGITS)}


def test_passes_can_be_read_otherwise() -> None:
    plans = (PLANS[1], PLANS[0])
    source = Capture(NumpyRunner(), CONFIG, PLANS)
    names = ["inp_embd", "blk.0.v"]
    given = source.records(names)
    view = Altered(source, plans, order=(1, 0), hidden=frozenset({(0, "blk.0.v")}))
    assert [(record.plan, [*record.taps]) for record in view.records(names)] == [
        (plans[0], ["inp_embd"]),
        (plans[1], names),
    ]
    (first,) = view.records(names, 1)
    assert first.taps["inp_embd"] is given[1].taps["inp_embd"]
