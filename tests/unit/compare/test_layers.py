"""Injected faults must be found and located; nothing missing may pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.capture import Capture
from crossval.compare.rows import LayersResult, Location
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.passes import PassPlan, Runner
from tests.support.compared import compare_layers
from tests.support.numpy_engine import CONFIG, MODEL, Fault, NumpyRunner, fault

PROMPT = (3, 14, 15, 9, 26)


def compare(
    candidate: Runner,
    reference: Runner | None = None,
    prompt: Sequence[int] = PROMPT,
    config: SpecConfig = CONFIG,
    max_bytes: int | None = None,
    **options: Any,
) -> LayersResult:
    ours, theirs = (Capture(one, config, max_bytes=max_bytes) for one in (candidate, reference or NumpyRunner()))
    result = compare_layers(ours, theirs, prompt, **options)
    keys = [(row.pass_index, taps.execution_index(row.tap, MODEL.n_layers)) for row in result.rows]
    assert keys == sorted(set(keys))
    return result


def first(result: LayersResult) -> Location:
    assert result.first_divergence is not None
    return result.first_divergence


def record(out: Path, **options: object) -> RecordedRunner:
    runner = options.pop("runner", None) or NumpyRunner()
    options.setdefault("n_decode", 4)
    record_trace(runner, MODEL, out, prompt_ids=PROMPT, prompt_text="p", **options)  # type: ignore[arg-type]
    return RecordedRunner(out)


def scale(factor: float):  # type: ignore[no-untyped-def]
    return lambda x: x * np.float32(factor)


def test_equal_engines_are_in_parity_bit_for_bit() -> None:
    result = compare(NumpyRunner())
    assert (result.verdict, result.first_divergence, result.first_inexact) == ("parity", None, None)
    assert {row.status for row in result.rows} == {"equal"}
    assert [row.tap for row in result.rows if row.pass_index == 0] == taps.of_model(3, outline=True)
    assert [plan.kind for plan in result.plan] == ["prefill"] + ["decode"] * 4
    assert result.token_ids[:5] == PROMPT
    assert len(result.token_ids) == 9
    assert (result.coverage.required, result.coverage.compared, result.coverage.skipped) == (30, 30, ())
    assert result.thresholds["policy"] == "same"


def test_full_compares_every_tap_of_every_pass() -> None:
    result = compare(NumpyRunner(), full=True, n_decode=2)
    assert result.verdict == "parity"
    assert result.mode == "full"
    for index in range(3):
        assert [row.tap for row in result.rows if row.pass_index == index] == taps.of_model(3)
    assert result.coverage.required == 3 * len(taps.of_model(3))


@pytest.mark.parametrize(
    ("tap", "factor"),
    [("inp_embd", 1.0001), *((name, -1.5) for name in taps.of_model(3)[1:]), ("blk.1.ffn_sub_norm", 0.1)],
)
def test_a_wrong_operation_is_named(tap: str, factor: float) -> None:
    result = compare(NumpyRunner(fault(tap, scale(factor))), n_decode=1)
    assert result.verdict == "divergence"
    assert (first(result).tap, first(result).pass_index) == (tap, 0)
    assert first(result).layer == taps.parse(tap).layer
    assert result.first_inexact is not None
    assert result.first_inexact.tap == tap


def test_scale_error_with_perfect_cosine_is_found() -> None:
    result = compare(NumpyRunner(fault("blk.2.ffn_down", scale(1.3))))
    assert first(result).tap == "blk.2.ffn_down"
    row = next(r for r in result.rows if r.tap == "blk.2.ffn_down" and r.pass_index == 0)
    assert row.cosine == pytest.approx(1.0, abs=1e-12)


def test_one_wrong_token_is_found_with_its_position() -> None:
    result = compare(NumpyRunner(fault("blk.1.attn_o_out", scale(3.0), token=2)))
    assert (first(result).tap, first(result).row) == ("blk.1.attn_o_out", 2)


def test_decode_only_fault_is_found_in_the_first_decode_pass() -> None:
    result = compare(NumpyRunner(fault("blk.1.k_rope", scale(-1.0), kind="decode")))
    assert result.verdict == "divergence"
    place = first(result)
    assert (place.pass_index, place.pass_kind, place.tap) == (1, "decode", "blk.1.k_rope")
    assert all(row.status == "equal" for row in result.rows if row.pass_index == 0)


def test_decode_only_fault_is_missed_without_decode_passes() -> None:
    result = compare(NumpyRunner(fault("blk.1.k_rope", scale(-1.0), kind="decode")), n_decode=0)
    assert result.verdict == "parity"
    assert len(result.plan) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("who", ["candidate", "reference", "both"])
def test_nan_is_never_parity(value: float, who: str) -> None:
    def poison(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[..., 0] = value
        return x

    broken = [NumpyRunner(fault("blk.1.ffn_up", poison)), NumpyRunner(fault("blk.1.ffn_up", poison))]
    result = compare(
        broken[0] if who != "reference" else NumpyRunner(), broken[1] if who != "candidate" else NumpyRunner()
    )
    assert result.verdict == "divergence"
    place = first(result)
    assert place.tap == "blk.1.ffn_up"
    assert place.note is not None
    assert "NaN" in place.note
    if who != "candidate":
        assert any("not usable" in skip.why for skip in result.coverage.skipped)


def test_shape_mismatch_is_a_divergence() -> None:
    result = compare(NumpyRunner(reshape={"blk.0.l_out": (5, 2, 4)}), n_decode=0)
    assert result.verdict == "divergence"
    assert (first(result).tap, first(result).row) == ("blk.0.l_out", None)
    assert "shape mismatch" in (first(result).note or "")


@pytest.mark.parametrize("lacking", ["candidate", "reference", "both"])
@pytest.mark.parametrize("tap", ["inp_embd", "blk.1.l_out", "result_norm", "result_output"])
def test_a_missing_outline_tap_is_incomplete(lacking: str, tap: str) -> None:
    candidate = NumpyRunner(lacks=[tap] if lacking != "reference" else [])
    reference = NumpyRunner(lacks=[tap] if lacking != "candidate" else [])
    result = compare(candidate, reference, n_decode=1)
    assert result.verdict == "incomplete"
    assert any(skip.tap == tap and "did not give it" in skip.why for skip in result.coverage.skipped)
    assert result.coverage.compared < result.coverage.required


def test_a_missing_operation_is_incomplete_only_when_asked_for() -> None:
    lacking = NumpyRunner(lacks=["blk.1.kq"])
    assert compare(lacking).verdict == "parity"
    result = compare(lacking, full=True)
    assert result.verdict == "incomplete"
    assert {skip.tap for skip in result.coverage.skipped} == {"blk.1.kq"}


def test_sub_norms_may_be_absent_on_both_sides_only() -> None:
    result = compare(NumpyRunner(sub_norms=False), NumpyRunner(sub_norms=False), full=True)
    assert result.verdict == "parity"
    assert len(result.rows) == 5 * (len(taps.of_model(3)) - 6)
    result = compare(NumpyRunner(lacks=["blk.0.ffn_sub_norm"]), full=True)
    assert result.verdict == "incomplete"


def test_rows_of_the_last_layer_may_be_the_last_token_only() -> None:
    result = compare(NumpyRunner(), NumpyRunner(last_rows=True), full=True)
    assert result.verdict == "parity"
    rows = {row.tap: row.rows_compared for row in result.rows if row.pass_index == 0}
    assert (rows["blk.2.kqv_out"], rows["blk.2.l_out"], rows["blk.1.l_out"]) == (5, 1, 5)


def test_within_bounds_is_parity_and_the_first_inexact_operation_is_named() -> None:
    result = compare(NumpyRunner(fault("blk.1.ffn_act", scale(1.0001))))
    assert (result.verdict, result.first_divergence) == ("parity", None)
    assert result.first_inexact is not None
    assert result.first_inexact.tap == "blk.1.ffn_act"


def test_the_first_difference_and_the_first_divergence_may_be_in_other_passes() -> None:
    def both(name: str, x: np.ndarray, plan: PassPlan) -> np.ndarray:
        if plan.kind == "prefill":
            return x * np.float32(1.0001) if name == "blk.0.ffn_act" else x
        return -x if name == "blk.1.v" else x

    result = compare(NumpyRunner(both))
    assert result.first_inexact is not None
    assert (result.first_inexact.pass_index, result.first_inexact.tap) == (0, "blk.0.ffn_act")
    assert (first(result).pass_index, first(result).tap) == (1, "blk.1.v")


def test_memory_is_bounded_only_the_found_layer_is_captured() -> None:
    candidate = NumpyRunner(fault("blk.1.v", scale(-1)))
    compare(candidate, max_bytes=1)
    outline = frozenset(taps.of_model(3, outline=True))
    found = outline | {name for name in taps.of_model(3) if taps.parse(name).layer == 1}
    assert [select for _, select in candidate.evals] == [outline] * 5 + [found] * 5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("change", [None, fault("blk.1.v", scale(-1)), fault("blk.2.ffn_act", scale(1.0001))])
def test_memory_decides_how_often_engines_run_and_nothing_else(change: Fault | None, full: bool) -> None:
    engines = [NumpyRunner(change), NumpyRunner(), NumpyRunner(change), NumpyRunner()]
    plenty = compare(*engines[:2], full=full)
    assert compare(*engines[2:], full=full, max_bytes=1) == plenty
    n_passes = len(plenty.plan)
    assert [len(engine.evals) for engine in engines[:2]] == [n_passes * (2 if full or change else 1)] * 2
    n_groups = 4 if full else 2 if change else 1  # the embedding is part of the outline
    assert [len(engine.evals) for engine in engines[2:]] == [n_passes * n_groups] * 2


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    compare(NumpyRunner(fault("blk.1.v", scale(-1))), progress=lambda *step: seen.append(step))
    assert ("layers", 5, 5) in seen
    assert seen[-1][1] == seen[-1][2]


def test_an_engine_that_changes_its_mind_is_not_in_parity() -> None:
    class Moody(NumpyRunner):
        runs = 0

        def reset(self) -> None:
            super().reset()
            self.runs += 1

        def weight(self, name: str, *shape: int) -> np.ndarray:
            factor = 1.0 if self.runs == 1 or name != "blk.0.gate" else 1.0001
            return super().weight(name, *shape) * np.float32(factor)

    result = compare(Moody(), full=True)
    assert result.verdict == "incomplete"
    assert any("not deterministic" in skip.why for skip in result.coverage.skipped)


def test_difference_that_no_operation_owns_says_so() -> None:
    result = compare(NumpyRunner(fault("blk.0.l_out", lambda x: x * np.float32(1.02))))
    assert first(result).tap == "blk.0.l_out"
    assert "no operation of this layer exceeds" in (first(result).note or "")


def test_golden_with_every_tap_stands_in_for_the_live_engine(tmp_path: Path) -> None:
    golden = record(tmp_path / "g", n_decode_full=4)
    result = compare(NumpyRunner(), golden, full=True)
    assert result.verdict == "parity"
    result = compare(NumpyRunner(fault("blk.2.kq", scale(2))), golden)
    assert first(result).tap == "blk.2.kq"


def test_coarse_golden_gives_the_layer_and_says_what_is_missing(tmp_path: Path) -> None:
    golden = record(
        tmp_path / "g", select_prefill=taps.of_model(3, outline=True), select_decode=taps.of_model(3, outline=True)
    )
    assert compare(NumpyRunner(), golden).verdict == "parity"
    result = compare(NumpyRunner(fault("blk.1.q", scale(-1))), golden)
    assert result.verdict == "divergence"
    place = first(result)
    assert place.tap == "blk.1.l_out"
    assert "ops of layer 1 not compared" in (place.note or "")
    assert "the reference (numpy) did not record it" in (place.note or "")
    assert {skip.tap for skip in result.coverage.skipped} == {
        name for name in taps.of_model(3) if taps.parse(name).layer == 1 and name != "blk.1.l_out"
    }


def test_partly_recorded_operations_name_what_was_not_seen(tmp_path: Path) -> None:
    names = [*taps.of_model(3, outline=True), "blk.1.ffn_norm", "blk.1.ffn_gate"]
    golden = record(tmp_path / "g", select_prefill=names)
    result = compare(NumpyRunner(fault("blk.1.q", scale(-2))), golden, n_decode=0)
    place = first(result)
    assert place.tap in ("blk.1.ffn_norm", "blk.1.ffn_gate")
    assert "not compared before it: attn_norm, q," in (place.note or "")


def test_inexact_layer_of_a_coarse_golden_does_not_spoil_parity(tmp_path: Path) -> None:
    golden = record(
        tmp_path / "g", select_prefill=taps.of_model(3, outline=True), select_decode=taps.of_model(3, outline=True)
    )
    result = compare(NumpyRunner(fault("blk.1.ffn_act", scale(1.0001))), golden)
    assert result.verdict == "parity"
    assert result.first_inexact is not None
    assert result.first_inexact.tap == "blk.1.l_out"
    assert len(result.notes) == 1


def test_default_golden_lacks_outline_taps_of_decode_passes(tmp_path: Path) -> None:
    golden = record(tmp_path / "g", select_decode=["result_output"])
    result = compare(NumpyRunner(), golden)
    assert result.verdict == "incomplete"
    assert compare(NumpyRunner(), golden, n_decode=0).verdict == "parity"


def test_a_recorded_candidate_fixes_the_tokens(tmp_path: Path) -> None:
    candidate = record(tmp_path / "c", runner=NumpyRunner(fault("result_output", lambda x: -x)), n_decode_full=4)
    reference = NumpyRunner()
    result = compare(candidate, reference)
    assert result.token_ids == candidate.info.token_ids
    assert first(result).tap == "result_output"


def test_short_trace_shortens_the_default_but_not_a_request(tmp_path: Path) -> None:
    golden = record(tmp_path / "g", n_decode=2, select_decode=taps.of_model(3))
    assert compare(NumpyRunner(), golden).verdict == "parity"
    assert len(compare(NumpyRunner(), golden).plan) == 3
    result = compare(NumpyRunner(), golden, n_decode=3)
    assert result.verdict == "incomplete"
    assert {skip.pass_index for skip in result.coverage.skipped} == {3}
    assert "only 3 of 4 passes" in result.coverage.skipped[0].why


def test_two_traces_that_part_are_compared_up_to_there(tmp_path: Path) -> None:
    ours = record(
        tmp_path / "a",
        runner=NumpyRunner(fault("result_output", lambda x: -x, kind="decode")),
        select_decode=taps.of_model(3),
    )
    theirs = record(tmp_path / "b", select_decode=taps.of_model(3))
    result = compare(ours, theirs, n_decode=4)
    assert result.verdict == "divergence"
    assert len(result.plan) == 2
    assert {skip.pass_index for skip in result.coverage.skipped} == {2, 3, 4}


def test_other_prompt_or_no_prompt_is_refused(tmp_path: Path) -> None:
    golden = record(tmp_path / "g")
    with pytest.raises(BadInputError, match="recorded with other tokens"):
        compare(NumpyRunner(), golden, prompt=(1, 2))
    with pytest.raises(BadInputError, match="no tokens"):
        compare(NumpyRunner(), prompt=())
    with pytest.raises(BadInputError, match="negative"):
        compare(NumpyRunner(), n_decode=-1)
    with pytest.raises(BadInputError, match="at least one layer"):
        compare(NumpyRunner(), config=replace(CONFIG, n_layers=0))


def test_traces_fed_in_other_pieces_are_refused(tmp_path: Path) -> None:
    whole, pieces = record(tmp_path / "a"), tmp_path / "b"
    from crossval.traces.write import TraceWriter

    runner = NumpyRunner()
    with TraceWriter(pieces, MODEL) as writer:
        for ids in (PROMPT[:2], PROMPT[2:]):
            writer.add_pass(runner.eval(ids, taps.of_model(3)))
        writer.finish(engine=runner.identity, prompt_ids=PROMPT)
    with pytest.raises(BadInputError, match="same pieces"):
        compare(RecordedRunner(pieces), whole)
    live = compare(RecordedRunner(pieces), NumpyRunner(), full=True)
    assert live.verdict == "parity"
    assert len(live.plan) == 2


def test_a_trace_with_a_damaged_pass_is_an_error_not_a_verdict(tmp_path: Path) -> None:
    golden = record(tmp_path / "g")
    (tmp_path / "g" / "pass-0001.safetensors").write_bytes(b"")
    with pytest.raises(BadInputError, match="pass-0001"):
        compare(NumpyRunner(), golden)
