"""The audits of a greedy comparison: both engines, in the first prompt's pass and one decoded token.

Beside the specification, also in later prompts with other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossval.audit import summary
from crossval.capture import Capture, make_feed, run
from crossval.compare.rows import GreedyPrompt, GreedyResult
from crossval.diagnose.findings import Finding
from crossval.examine.examination import audit_both
from crossval.examine.greedy_verdict import is_clean
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, Runner
from crossval.receipts.party import SPECIFICATION
from crossval.terms import LOGITS, SIDES, Progress, Side

N_DECODED = 1
"""Decoded tokens that are audited, after the prompt."""
MOST_FURTHER = 16
"""Prompts after the first that are audited, at most: those with other tokens beside the specification."""


@dataclass(frozen=True)
class GreedyAudit:
    """Both engines' audits over the same passes, and what was found."""

    passes: tuple[PassPlan, ...]
    audits: Mapping[Side, dict[str, Any] | None]
    """As a receipt holds them; None for an engine that computes something else while it is watched."""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def audited_passes(candidate: Runner, reference: Runner, prompt: GreedyPrompt) -> tuple[PassPlan, ...]:
    """Return the passes of the prompt, and the first decoded token when the comparison had more than one step.

    Beside the specification every pass up to the last token that differs: only an audit of these tells a near tie
    from an error.

    Raises:
        BadInputError: a trace that was recorded with other tokens.
    """
    n_decoded = min(N_DECODED, prompt.steps_required - 1)
    if SPECIFICATION in (candidate.identity.name, reference.identity.name):
        differ = (step.step for step in prompt.steps if step.candidate_token != step.reference_token)
        n_decoded = max(n_decoded, max(differ, default=0))
    feed = make_feed(candidate, reference, prompt.prompt_ids, n_decoded, n_decoded)
    tokens = iter([step.reference_token for step in prompt.steps])
    while feed.next_plan(next(tokens, None) if len(feed.done) >= feed.n_prompt_passes else None) is not None:
        pass
    return tuple(feed.done)


def audit_prompt(
    candidate: Runner,
    reference: Runner,
    prompt: GreedyPrompt,
    weights: SpecWeights,
    *,
    progress: Progress | None = None,
) -> GreedyAudit:
    """Audit two entered runners over the first passes of a prompt that was compared, and diagnose what is wrong.

    A live engine runs again, with every tensor captured (several times if memory is short). An engine whose logits
    differ from those it gives unwatched has not been audited: what was judged is not what was compared.

    Raises:
        BadInputError: a trace recorded with other tokens, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    plan = audited_passes(candidate, reference, prompt)
    ours, theirs = (Capture(runner, weights.config, plan) for runner in (candidate, reference))
    audits, findings = audit_both(ours, theirs, weights, progress=progress)
    held: dict[Side, dict[str, Any] | None] = {side: summary.to_json(found) for side, found in audits.items()}
    notes = []
    for side, one in zip(SIDES, (ours, theirs), strict=True):
        if one.runner.status == "live":
            one.note(run(one.runner, [part.token_ids for part in plan], (LOGITS,)))
        if any(tap == LOGITS for _, tap in one.unsteady):
            held[side] = None
            notes.append(f"the {side} was not audited: its logits change when its tensors are captured")
    kept = tuple(found for found in findings if held[found.side] is not None)
    return GreedyAudit(plan, held, kept, tuple(notes))


def audit_differing(
    engines: Sequence[tuple[Runner, Runner]],
    result: GreedyResult,
    weights: SpecWeights,
    first: GreedyAudit,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[int, GreedyAudit]]:
    """Audit the later prompts with other tokens, beside the specification, until one is not clean.

    ``engines``: of each prompt. ``first``: what the first prompt's audits found; unless both are clean there is
    nothing to tell of others. Yields index and audits, of ``MOST_FURTHER`` prompts at most.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: as ``audit_prompt``.
    """
    if SPECIFICATION not in [one.identity.name for one in engines[0]] or not is_clean(first.audits):
        return
    differing = [i for i, prompt in enumerate(result.prompts) if i and prompt.first_divergence is not None]
    for index in differing[:MOST_FURTHER]:
        found = audit_prompt(*engines[index], result.prompts[index], weights, progress=progress)
        yield index, found
        if not is_clean(found.audits):
            return
