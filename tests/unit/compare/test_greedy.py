"""Greedy decoding: where the tokens part, why, and what each engine writes when left alone."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from crossval.capture import greedy_token
from crossval.compare.greedy import compare_greedy, merge_greedy, name_near_ties
from crossval.compare.rows import GreedyPrompt, GreedyResult
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError
from crossval.passes import PassPlan
from crossval.traces.write import TraceWriter
from tests.support.numpy_engine import MODEL, NumpyRunner, fault

PROMPT = (3, 14, 15, 9, 26)
STEPS = 6


def greedy(candidate: object, reference: object = None, steps: int = STEPS) -> tuple[GreedyResult, GreedyPrompt]:
    result = compare_greedy(
        candidate, reference or NumpyRunner(), PROMPT, steps, n_layers=MODEL.n_layers, text="p"
    )  # type: ignore[arg-type]
    return result, result.prompts[0]


def record(out: Path, runner: NumpyRunner | None = None, n_decode: int = STEPS) -> RecordedRunner:
    record_trace(runner or NumpyRunner(), MODEL, out, prompt_ids=PROMPT, n_decode=n_decode)
    return RecordedRunner(out)


def alone(runner: NumpyRunner, steps: int = STEPS) -> tuple[int, ...]:
    """Decode greedily by hand."""
    runner.reset()
    ids, out = list(PROMPT), []
    for _ in range(steps):
        logits = runner.eval(ids, ["result_output"]).taps["result_output"].array[-1]
        out.append(int(np.argmax(logits)))
        ids = out[-1:]
    return tuple(out)


def prefer(token: int, from_position: int, by: float = 100.0):  # type: ignore[no-untyped-def]
    """Return a fault: from a position on, the logits favour one token."""

    def apply(name: str, x: np.ndarray, plan: PassPlan) -> np.ndarray:
        if name == "result_output" and plan.positions[-1] >= from_position:
            x = x.copy()
            x[-1, token] += by
        return x

    return apply


def test_equal_engines_agree_and_run_once() -> None:
    candidate, reference = NumpyRunner(), NumpyRunner()
    result, prompt = greedy(candidate, reference)
    assert (result.verdict, result.exact_match_rate) == ("parity", 1.0)
    assert prompt.candidate_tokens == prompt.reference_tokens == alone(NumpyRunner())
    assert (prompt.free_running_matches, prompt.first_divergence, prompt.teacher_forced_agreement) == (
        6,
        None,
        1.0,
    )
    assert [step.step for step in prompt.steps] == list(range(STEPS))
    assert all(step.logits.bitwise_equal and not step.forced for step in prompt.steps)
    assert [step.logits.pass_kind for step in prompt.steps] == ["prefill"] + ["decode"] * 5
    assert len(candidate.evals) == len(reference.evals) == STEPS
    assert prompt.text == "p"


def test_margin_is_the_distance_of_the_two_best() -> None:
    runner = NumpyRunner()
    logits = runner.eval(PROMPT, ["result_output"]).taps["result_output"].array[-1]
    best = np.sort(logits)[::-1]
    step = greedy(NumpyRunner())[1].steps[0]
    assert step.reference_margin == step.candidate_margin == pytest.approx(float(best[0]) - float(best[1]))


def test_a_different_token_is_a_divergence_with_both_modes_reported() -> None:
    broken = prefer(7, from_position=len(PROMPT) + 1)
    candidate, reference = NumpyRunner(broken), NumpyRunner()
    result, prompt = greedy(candidate, reference)
    own, theirs = alone(NumpyRunner(broken)), alone(NumpyRunner())
    assert own[:2] == theirs[:2]
    assert own[2] == 7 != theirs[2]
    assert result.verdict == "divergence"
    assert prompt.first_divergence == 2
    assert (prompt.candidate_tokens, prompt.reference_tokens) == (own, theirs)
    assert prompt.free_running_matches == sum(a == b for a, b in zip(own, theirs, strict=True))
    assert result.exact_match_rate == prompt.free_running_matches / STEPS
    assert [step.forced for step in prompt.steps] == [False, False, False, True, True, True]
    assert len(reference.evals) == STEPS
    assert [ids for ids, _ in candidate.evals[:STEPS]] == [ids for ids, _ in reference.evals]
    step = prompt.steps[2]
    assert (step.candidate_token, step.near_tie) == (7, False)
    assert "not a tie" in (step.explanation or "")
    assert prompt.teacher_forced_agreement is not None
    assert prompt.teacher_forced_agreement < 1


def test_a_flip_within_bounds_is_a_near_tie_of_right_engines_and_still_differs() -> None:
    runner = NumpyRunner()
    logits = runner.eval(PROMPT, ["result_output"]).taps["result_output"].array[-1]
    order = np.argsort(logits)[::-1]
    gap = float(logits[order[0]] - logits[order[1]])

    def tie(by: float):  # type: ignore[no-untyped-def]
        def apply(name: str, x: np.ndarray, plan: PassPlan) -> np.ndarray:
            if name == "result_output" and plan.kind == "prefill":
                x = x.copy()
                x[-1, order[1]] += by
            return x

        return apply

    result, prompt = greedy(NumpyRunner(tie(gap + 0.001)), NumpyRunner(tie(gap - 0.001)))
    step = prompt.steps[0]
    assert step.near_tie is False  # as long as nobody knows whether both compute rightly
    assert "near tie" not in (step.explanation or "")
    assert (step.explanation or "").endswith("within their bounds")
    known = name_near_ties(result).prompts[0].steps[0]
    assert known.near_tie is True
    assert (known.explanation or "").endswith("within their bounds: a near tie")
    assert step.reference_margin == pytest.approx(0.001, rel=1e-2)
    assert (result.verdict, prompt.first_divergence) == ("divergence", 0)


def test_tokens_that_differ_beyond_bounds_are_no_near_tie_of_right_engines_either() -> None:
    result = greedy(NumpyRunner(prefer(7, from_position=len(PROMPT) + 1)))[0]
    assert name_near_ties(result) == result


def test_equal_tokens_of_engines_that_state_the_same_arithmetic_need_equal_bits() -> None:
    def almost(x: np.ndarray) -> np.ndarray:
        return np.nextafter(x, np.float32(9), dtype=np.float32)

    for width, verdict in ((8, "divergence"), (None, "parity")):
        result, prompt = greedy(NumpyRunner(fault("result_output", almost), simd_width=width))
        assert (result.verdict, result.exact_match_rate, prompt.first_divergence) == (verdict, 1.0, None)
        assert {step.logits.status for step in prompt.steps} == {"within"}


def test_exact_ties_go_to_the_lowest_id() -> None:
    flat = fault("result_output", np.zeros_like)
    result, prompt = greedy(NumpyRunner(flat), NumpyRunner(flat))
    assert result.verdict == "parity"
    assert prompt.candidate_tokens == (0,) * STEPS
    assert prompt.steps[0].reference_margin == 0.0


def test_equal_tokens_with_other_logits_are_a_divergence() -> None:
    result, prompt = greedy(NumpyRunner(fault("result_output", lambda x: x * np.float32(2))))
    assert (result.verdict, result.exact_match_rate, prompt.first_divergence) == ("divergence", 1.0, None)
    assert all(step.logits.status == "diverged" for step in prompt.steps)


@pytest.mark.parametrize("who", ["candidate", "reference", "both"])
def test_nan_logits_are_never_parity(who: str) -> None:
    broken = fault("result_output", lambda x: np.full_like(x, np.nan), kind="decode")
    candidate = NumpyRunner(broken if who != "reference" else None)
    reference = NumpyRunner(broken if who != "candidate" else None)
    result, prompt = greedy(candidate, reference)
    assert result.verdict == "divergence"
    assert len(prompt.steps) == 2
    assert None in (prompt.steps[1].candidate_token, prompt.steps[1].reference_token)
    assert "not usable" in (prompt.why_incomplete or "")
    assert prompt.teacher_forced_agreement == 0.5


@pytest.mark.parametrize("who", ["candidate", "reference"])
def test_missing_logits_are_incomplete(who: str) -> None:
    lacking, whole = NumpyRunner(lacks=["result_output"]), NumpyRunner()
    result, prompt = greedy(*((lacking, whole) if who == "candidate" else (whole, lacking)))
    assert (result.verdict, result.exact_match_rate, prompt.steps) == ("incomplete", 0.0, ())
    assert who in (prompt.why_incomplete or "")


def test_golden_reference_uses_its_recorded_passes(tmp_path: Path) -> None:
    golden = record(tmp_path / "g")
    assert greedy(NumpyRunner(), golden)[0].verdict == "parity"
    result, prompt = greedy(NumpyRunner(prefer(7, 6)), golden)
    assert result.verdict == "divergence"
    assert prompt.candidate_tokens == alone(NumpyRunner(prefer(7, 6)))
    assert prompt.reference_tokens == alone(NumpyRunner())
    assert len(prompt.steps) == STEPS


def test_a_golden_that_is_too_short_is_incomplete(tmp_path: Path) -> None:
    result, prompt = greedy(NumpyRunner(), record(tmp_path / "g", n_decode=2))
    assert result.verdict == "incomplete"
    assert (len(prompt.steps), prompt.steps_required) == (3, STEPS)
    assert "only 3 of 6" in (prompt.why_incomplete or "")
    assert result.exact_match_rate == 0.5
    assert greedy(NumpyRunner(), record(tmp_path / "h", n_decode=5))[0].verdict == "parity"


def test_a_recorded_candidate_teaches_a_live_reference(tmp_path: Path) -> None:
    assert greedy(record(tmp_path / "a"))[0].verdict == "parity"
    broken = NumpyRunner(prefer(7, 6))
    result, prompt = greedy(record(tmp_path / "b", broken))
    assert result.verdict == "divergence"
    assert prompt.candidate_tokens == alone(NumpyRunner(prefer(7, 6)))
    assert prompt.reference_tokens == alone(NumpyRunner())
    assert len(prompt.steps) == STEPS


def test_two_traces_are_compared_until_they_part(tmp_path: Path) -> None:
    ours, theirs = record(tmp_path / "a", NumpyRunner(prefer(7, 6))), record(tmp_path / "b")
    result, prompt = greedy(ours, theirs)
    assert result.verdict == "divergence"
    assert (prompt.first_divergence, len(prompt.steps)) == (2, 3)
    assert prompt.candidate_tokens == alone(NumpyRunner(prefer(7, 6)))
    assert prompt.reference_tokens == alone(NumpyRunner())
    assert greedy(record(tmp_path / "c"), theirs)[0].verdict == "parity"


def test_a_trace_not_decoded_greedily_is_refused(tmp_path: Path) -> None:
    runner = NumpyRunner()
    with TraceWriter(tmp_path / "t", MODEL) as writer:
        for ids in (PROMPT, (1,), (2,)):
            writer.add_pass(runner.eval(ids, ["result_output"]))
        writer.finish(engine=runner.identity, prompt_ids=PROMPT)
    with pytest.raises(BadInputError, match="not decoded greedily"):
        greedy(NumpyRunner(), RecordedRunner(tmp_path / "t"), steps=3)


def test_prompts_are_merged() -> None:
    good, bad = greedy(NumpyRunner())[0], greedy(NumpyRunner(prefer(7, 6)))[0]
    merged = merge_greedy([good, bad])
    assert (len(merged.prompts), merged.verdict) == (2, "divergence")
    assert merged.exact_match_rate == (good.exact_match_rate + bad.exact_match_rate) / 2
    assert merge_greedy([good, good]).verdict == "parity"
    with pytest.raises(BadInputError, match="no prompt"):
        merge_greedy([])
    other = compare_greedy(NumpyRunner(simd_width=16), NumpyRunner(), PROMPT, 1, n_layers=3)
    with pytest.raises(BadInputError, match="different thresholds"):
        merge_greedy([good, other])


def test_no_steps_and_no_prompt_are_refused() -> None:
    with pytest.raises(BadInputError, match="at least one step"):
        greedy(NumpyRunner(), steps=0)
    with pytest.raises(BadInputError, match="no tokens"):
        compare_greedy(NumpyRunner(), NumpyRunner(), (), 3, n_layers=3)


def test_a_context_once_forced_stays_forced() -> None:
    def once(name: str, x: np.ndarray, plan: PassPlan) -> np.ndarray:
        return prefer(7, 6)(name, x, plan) if plan.positions[-1] == 6 else x

    _, prompt = greedy(NumpyRunner(once))
    assert [step.candidate_token == step.reference_token for step in prompt.steps] == [True] * 2 + [False] + [
        True
    ] * 3
    assert [step.forced for step in prompt.steps] == [False] * 3 + [True] * 3
    assert prompt.teacher_forced_agreement == 5 / 6


def test_logits_of_another_token_choose_nothing() -> None:
    record = NumpyRunner().eval(PROMPT, ["result_output"])
    assert greedy_token(record) is not None
    early = replace(record, taps={"result_output": replace(record.taps["result_output"], rows=(0,))})
    assert greedy_token(early) is None


def test_a_result_keeps_no_logits() -> None:
    result = merge_greedy([greedy(NumpyRunner())[0], greedy(NumpyRunner(prefer(7, 6)))[0]])
    seen: set[int] = set()
    found: list[object] = [result.prompts]
    while found:
        one = found.pop()
        if id(one) not in seen and not isinstance(one, type | ModuleType):
            seen.add(id(one))
            assert not isinstance(one, np.ndarray)
            found += gc.get_referents(one)
    assert len(seen) > 2 * STEPS
