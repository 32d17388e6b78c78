"""Greedy decoding, token by token: free-running (each engine its own way) and teacher-forced (same context).

As long as the tokens agree the two are the same run. The teacher is the reference, unless only the candidate is
recorded: then the candidate's recorded tokens are what both are fed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from crossval.capture import Feed, greedy_token, last_logits, make_feed
from crossval.compare.rows import (
    GreedyPrompt,
    GreedyResult,
    GreedyStep,
    Skip,
    TapRow,
    choose_policy,
    compare_tap,
    row_status,
)
from crossval.errors import BadInputError
from crossval.model.tolerance import PolicyName, describe, tolerance_for
from crossval.passes import PassPlan, PassRecord, Runner
from crossval.terms import LOGITS, SIDES, Progress


def compare_greedy(
    candidate: Runner,
    reference: Runner,
    prompt_ids: Sequence[int],
    steps: int,
    *,
    n_layers: int,
    policy: PolicyName | None = None,
    text: str | None = None,
    progress: Progress | None = None,
) -> GreedyResult:
    """Compare ``steps`` generated tokens of one prompt; join prompts with ``merge_greedy``.

    Raises:
        BadInputError: no steps, empty prompt, or a trace recorded with other tokens or not decoded greedily.
        UnavailableError, EngineCrashError: from a runner.
    """
    if steps < 1:
        raise BadInputError(f"at least one step is needed, got {steps}")
    policy = policy or choose_policy(candidate.identity, reference.identity)
    feed = make_feed(candidate, reference, prompt_ids, steps - 1, steps - 1)
    run = _Run(candidate, reference, feed, steps, n_layers, policy, progress or (lambda *_: None))
    rows, why = _forced(run)
    prompt = _free_running(run, rows, why, text)
    return GreedyResult((prompt,), describe(policy))


def merge_greedy(results: Sequence[GreedyResult]) -> GreedyResult:
    """Join the results of several prompts, all held to the same thresholds.

    Raises:
        BadInputError: no result, or different thresholds.
    """
    if not results:
        raise BadInputError("no prompt was compared")
    if any(result.thresholds != results[0].thresholds for result in results):
        raise BadInputError("the prompts were held to different thresholds; compare them separately")
    return GreedyResult(tuple(prompt for result in results for prompt in result.prompts), results[0].thresholds)


def name_near_ties(result: GreedyResult) -> GreedyResult:
    """Call differing tokens near ties where logits agree within bounds; both engines are known to be correct."""
    prompts = tuple(
        replace(prompt, steps=tuple(_as_near_tie(step) for step in prompt.steps)) for prompt in result.prompts
    )
    return replace(result, prompts=prompts)


def _as_near_tie(step: GreedyStep) -> GreedyStep:
    if step.near_tie is not False or row_status(step.logits) not in ("equal", "within"):
        return step
    return replace(step, near_tie=True, explanation=f"{step.explanation}: a near tie")


@dataclass
class _Run:
    candidate: Runner
    reference: Runner
    feed: Feed
    steps: int
    n_layers: int
    policy: PolicyName
    progress: Progress

    @property
    def teacher_is_candidate(self) -> bool:
        return self.candidate.plan is not None and self.reference.plan is None


def _forced(run: _Run) -> tuple[list[GreedyStep], str | None]:
    """Feed both engines the teacher's tokens; return the steps, and why there are fewer than asked for."""
    run.candidate.reset()
    run.reference.reset()
    steps: list[GreedyStep] = []
    token: int | None = None
    parted = False
    while (plan := run.feed.next_plan(token)) is not None:
        index = len(run.feed.done) - 1
        if token is not None and plan.token_ids != (token,):
            return steps, _not_greedy(run, len(steps), token, plan)
        is_step = index >= run.feed.n_prompt_passes - 1
        select = (LOGITS,) if is_step else ()
        ours, theirs = run.candidate.eval(plan.token_ids, select), run.reference.eval(plan.token_ids, select)
        if not is_step:
            continue
        run.progress("tokens", len(steps), run.steps)
        missing = [side for side, record in zip(SIDES, (ours, theirs), strict=True) if LOGITS not in record.taps]
        if missing:
            return steps, f"the {missing[0]} gives no logits in pass {index}"
        row = compare_tap(
            LOGITS,
            index,
            plan,
            ours.taps[LOGITS],
            theirs.taps[LOGITS],
            tolerance_for(LOGITS, run.n_layers, run.policy),
        )
        if isinstance(row, Skip):
            return steps, row.why
        steps.append(_step(len(steps), ours, theirs, row, parted))
        last = steps[-1]
        parted = parted or last.candidate_token != last.reference_token
        token = last.candidate_token if run.teacher_is_candidate else last.reference_token
        if last.candidate_token is None or last.reference_token is None:
            return steps, "logits are not usable (NaN, infinite, or not of the last token)"
    run.progress("tokens", len(steps), run.steps)
    return steps, run.feed.ended


def _not_greedy(run: _Run, step: int, token: int, plan: PassPlan) -> str:
    teacher = "candidate" if run.teacher_is_candidate else "reference"
    raise BadInputError(
        f"the {teacher}'s trace was not decoded greedily: step {step} was fed token {plan.token_ids[0]}, "
        f"its own logits choose {token}; record it with greedy decoding"
    )


def _step(step: int, ours: PassRecord, theirs: PassRecord, row: TapRow, forced: bool) -> GreedyStep:
    c, r = last_logits(ours), last_logits(theirs)
    c_token, r_token = greedy_token(ours), greedy_token(theirs)
    near_tie, explanation = None, None
    if c is not None and r is not None and c.shape == r.shape and c_token != r_token:
        near_tie = False  # until both engines' arithmetic is known to be correct
        explanation = _explain_choice(c, r, row.status in ("equal", "within"))
    return GreedyStep(
        step=step,
        candidate_token=c_token,
        reference_token=r_token,
        forced=forced,
        logits=row,
        candidate_margin=_margin(c),
        reference_margin=_margin(r),
        near_tie=near_tie,
        explanation=explanation,
    )


def _explain_choice(c: npt.NDArray[np.float32], r: npt.NDArray[np.float32], within: bool) -> str:
    """Say how close the choice was; the margin means something only beside the engines' own difference."""
    c_token, r_token = int(np.argmax(c)), int(np.argmax(r))
    margin = float(r[r_token]) - float(r[c_token])
    rms = math.sqrt(float(np.mean((c.astype(np.float64) - r.astype(np.float64)) ** 2)))
    scale = math.sqrt(float(np.mean(r.astype(np.float64) ** 2)))
    share = f" ({100 * rms / scale:.2g} % of their rms)" if scale else ""
    cause = "within their bounds" if within else "beyond their bounds: not a tie, a real difference"
    return (
        f"the reference prefers {r_token} to {c_token} by {margin:.3g}; "
        f"the two engines' logits differ by {rms:.3g} rms{share}, {cause}"
    )


def _margin(logits: npt.NDArray[np.float32] | None) -> float | None:
    if logits is None or logits.size < 2:
        return None
    second, first = np.partition(logits, -2)[-2:]
    return float(first) - float(second)


def _free_running(run: _Run, steps: list[GreedyStep], why: str | None, text: str | None) -> GreedyPrompt:
    """Complete the free-running sequences: what each engine writes when left alone."""
    ours = [step.candidate_token for step in steps]
    theirs = [step.reference_token for step in steps]
    parted = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if parted is not None:
        # The teacher was fed its own tokens already; the other engine needs a run of its own, and so does the
        # teacher when two traces part and end the common run early.
        if run.teacher_is_candidate or len(steps) < run.steps:
            theirs = _alone(run.reference, run, theirs)
        if not run.teacher_is_candidate or len(steps) < run.steps:
            ours = _alone(run.candidate, run, ours)
    agreed = [step.candidate_token is not None and step.candidate_token == step.reference_token for step in steps]
    candidate_tokens, reference_tokens = _until_none(ours), _until_none(theirs)
    return GreedyPrompt(
        prompt_ids=run.feed.prompt_ids,
        steps_required=run.steps,
        steps=tuple(steps),
        candidate_tokens=candidate_tokens,
        reference_tokens=reference_tokens,
        free_running_matches=sum(a == b for a, b in zip(candidate_tokens, reference_tokens, strict=False)),
        first_divergence=parted,
        teacher_forced_agreement=sum(agreed) / len(agreed) if agreed else None,
        text=text,
        why_incomplete=why if len(steps) < run.steps else None,
    )


def _alone(runner: Runner, run: _Run, known: list[int | None]) -> list[int | None]:
    """Return up to ``run.steps`` tokens of an engine fed its own choices; a trace ends where it ends."""
    if any(token is None for token in known):
        return known
    runner.reset()
    tokens: list[int | None] = []
    feed = Feed(run.feed.prompt_ids, run.steps - 1, runner.plan, run.feed.longest)
    token: int | None = None
    while (plan := feed.next_plan(token)) is not None:
        run.progress("free-running", len(tokens), run.steps)
        is_step = len(feed.done) >= feed.n_prompt_passes
        record = runner.eval(plan.token_ids, (LOGITS,) if is_step else ())
        if not is_step:
            continue
        if token is not None and plan.token_ids != (token,):
            break
        token = greedy_token(record)
        tokens.append(token)
        if token is None:
            break
    run.progress("free-running", len(tokens), run.steps)
    return tokens


def _until_none(tokens: Sequence[int | None]) -> tuple[int, ...]:
    kept: list[int] = []
    for token in tokens:
        if token is None:
            break
        kept.append(token)
    return tuple(kept)
