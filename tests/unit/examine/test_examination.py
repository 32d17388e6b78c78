"""Comparison, audit and diagnosis together: how often engines run for them, and that memory changes no result."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval import capture
from crossval.diagnose import findings
from crossval.engines.record import record_trace, trace_model
from crossval.engines.recorded import RecordedRunner
from crossval.examine.examination import Examination, examine
from crossval.passes import Numerics, PassRecord, Runner
from tests.support.narrow_engine import NarrowEngine, Style
from tests.support.strangers import Fault, Stranger
from tests.support.wrapped import Wrapped

IDS = (1, 17, 42, 250, 3)
FAULTS = {
    "none": Fault(),
    "engine wrong": Fault(rolled_from="1/ffn_sub_norm"),
    "recorded wrongly": Fault(scaled=(("blk.0.ffn_act", 1.01),)),
    "recorded without values": Fault(invalid="blk.1.ffn_up"),
}


class Counted(Stranger):
    """Counts how often it is given the prompt, and the passes of other lengths that tell causes apart."""

    n_runs = 0
    name = "other"

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        self.n_runs += tuple(token_ids) == IDS
        return super().eval(token_ids, select)


@pytest.fixture
def engines(model_path: Path) -> Iterator[tuple[Counted, Counted]]:
    with Counted(model_path, n_threads=1) as ours, Counted(model_path, n_threads=1) as theirs:
        yield ours, theirs


def seen(found: Examination) -> dict[str, Any]:
    """Return everything that reaches a receipt."""
    return {
        "result": found.result,
        "audits": found.audits_json(),
        "findings": [findings.to_json(one, "command") for one in found.findings],
    }


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_engine_runs_twice_whatever_is_found(
    engines: tuple[Counted, Counted], model_path: Path, fault: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines[0].fault = FAULTS[fault]
    found = examine(*engines, IDS, model_path, n_decode=2, full=full)
    assert found.result.mode == ("full" if full else "outline")
    assert len(found.audits["candidate"].misrecorded) == ("recorded" in fault)
    assert len(found.findings) == (fault == "engine wrong")
    assert [engine.n_runs for engine in engines] == [2, 2]
    monkeypatch.setattr(capture, "MAX_BYTES", 1)
    again = examine(*engines, IDS, model_path, n_decode=2, full=full)
    assert seen(again) == seen(found)
    assert all(engine.n_runs > 4 for engine in engines)


@pytest.mark.parametrize("style", [Style("bf16"), Style("f16")])
def test_neither_a_found_format_nor_its_wider_bounds_take_another_run(shipped_model: Path, style: Style) -> None:
    engine = Wrapped(NarrowEngine(shipped_model, style), numerics=Numerics())
    with Counted(shipped_model, n_threads=1) as other:
        found = examine(engine, other, IDS, shipped_model, n_decode=1)
    assert found.audits["candidate"].precision is not None
    assert found.result.thresholds["policy"] == style.compute
    assert found.result.verdict == "parity"
    assert other.n_runs == 2


def test_a_trace_recorded_wrongly_is_read_once(model_path: Path, tmp_path: Path) -> None:
    """``q`` copied after RoPE turned it: its audit, the search for what is recorded wrongly, and what it holds."""
    read: list[tuple[str, ...]] = []

    class AfterRope(Stranger):
        def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
            record = super().eval(token_ids, select)
            turned = {f"blk.{i}.q": record.taps[f"blk.{i}.q_rope"] for i in range(2)}
            return PassRecord(record.plan, {**record.taps, **turned} if len(select) > 9 else record.taps)

    class Reading(RecordedRunner):
        def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
            read.append(tuple(token_ids))
            return super().eval(token_ids, select)

    with ExitStack() as stack:
        wrong: Runner = stack.enter_context(AfterRope(model_path, n_threads=1))
        other = stack.enter_context(Counted(model_path, n_threads=1))
        record_trace(wrong, trace_model(model_path), tmp_path / "t", prompt_ids=IDS)
        found = examine(Reading(tmp_path / "t"), other, IDS, model_path)
    assert [one.taps for one in found.audits["candidate"].misrecorded] == [("blk.0.q", "blk.1.q")]
    assert read == [IDS]
    assert other.n_runs == 2
    assert np.isfinite(found.result.rows[0].max_abs or 0.0)
