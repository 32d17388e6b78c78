"""A greedy receipt held against itself: prompts, steps, and the audits of the first prompt.

Returns complaints, empty when all is well, as in ``crossval.receipts.consistency``.
"""

from __future__ import annotations

from collections.abc import Iterator

from crossval.audit import receipt_checks as audit_consistency
from crossval.audit.summary import audit_verdict
from crossval.compare import rows as compare
from crossval.compare.rows import GreedyPrompt, GreedyResult, GreedyStep
from crossval.passes import pass_kind
from crossval.receipts import evidence
from crossval.receipts.file import Receipt
from crossval.receipts.values import same, show
from crossval.terms import LOGITS, SIDES


def structure(receipt: Receipt, result: GreedyResult) -> list[str]:
    """Check prompts and steps of a ``greedy`` receipt against each other, its model and its settings."""
    complaints = []
    vocab_size = receipt["model"]["shape"]["vocab_size"]
    if result.prompts and list(result.prompts[0].prompt_ids) != receipt["prompt"]["token_ids"]:
        complaints.append("prompt.token_ids are not those of the first prompt")
    if result.prompts and result.prompts[0].text != receipt["prompt"]["text"]:
        complaints.append("prompt.text is not that of the first prompt")
    if (result.from_journal or 0) > len(result.prompts):
        complaints.append(
            f"results.from_journal is {result.from_journal}, there are {len(result.prompts)} prompts"
        )
    both_right = _both_right(receipt)
    for index, prompt in enumerate(result.prompts):
        complaints += [f"prompt {index}: {what}" for what in _prompt_conflicts(prompt, vocab_size, both_right)]
        if prompt.steps_required != receipt["settings"]["n_steps"]:
            complaints.append(
                f"prompt {index}: steps_required is {prompt.steps_required}, "
                f"settings.n_steps is {show(receipt['settings']['n_steps'])}"
            )
    return complaints


def _both_right(receipt: Receipt) -> bool:
    """Return whether both engines were audited and are right, without which no near tie is known."""
    audits = receipt.get("audit") or {}
    return all(audit_verdict(audits.get(side)) == "clean" for side in SIDES)


def _prompt_conflicts(prompt: GreedyPrompt, vocab_size: int, both_right: bool) -> Iterator[str]:
    if not prompt.prompt_ids:
        yield "no prompt tokens"
    if [step.step for step in prompt.steps] != list(range(len(prompt.steps))):
        yield "steps are missing, repeated or out of order"
    lengths = (len(prompt.steps), len(prompt.candidate_tokens), len(prompt.reference_tokens))
    if max(lengths) > prompt.steps_required:
        yield f"{max(lengths)} steps or tokens, {prompt.steps_required} required"
    for step in prompt.steps:
        yield from (f"step {step.step}: {what}" for what in _step_conflicts(prompt, step, vocab_size, both_right))
    differs = [step.step for step in prompt.steps if step.candidate_token != step.reference_token]
    if prompt.first_divergence != (differs[0] if differs else None):
        yield f"first_divergence is {show(prompt.first_divergence)}, the steps say {differs[:1]}"
    # Up to the first difference both engines run freely in the same context; after it, one is led by the other.
    together = prompt.steps[: differs[0] + 1] if differs else prompt.steps
    for side in ("candidate", "reference"):
        chosen = [getattr(step, f"{side}_token") for step in together]
        chosen = chosen[: chosen.index(None)] if None in chosen else chosen
        if chosen != list(getattr(prompt, f"{side}_tokens")[: len(chosen)]):
            yield f"{side}_tokens are not what the steps chose"
    agreement = (len(prompt.steps) - len(differs)) / len(prompt.steps) if prompt.steps else None
    if not same(agreement, prompt.teacher_forced_agreement):
        yield f"teacher_forced_agreement is {show(prompt.teacher_forced_agreement)}, the steps say {agreement}"
    matches = sum(a == b for a, b in zip(prompt.candidate_tokens, prompt.reference_tokens, strict=False))
    if prompt.free_running_matches != matches:
        yield f"free_running_matches is {prompt.free_running_matches}, the sequences say {matches}"
    if any(step.forced != bool(differs and step.step > differs[0]) for step in prompt.steps):
        yield "forced is not set exactly on the steps after the first difference"


def _step_conflicts(prompt: GreedyPrompt, step: GreedyStep, vocab_size: int, both_right: bool) -> Iterator[str]:
    row, status = step.logits, compare.row_status(step.logits)
    if row.tap != LOGITS:
        yield f"compares {row.tap}, not the logits"
    elif status != "invalid" and (row.rows_compared, row.n_elements) != (1, vocab_size):
        yield f"{row.rows_compared} x {row.n_elements} logits, expected 1 x {vocab_size}"
    if row.pass_index != prompt.steps[0].logits.pass_index + step.step or (
        step.step and row.pass_kind != pass_kind(1, len(prompt.prompt_ids))
    ):
        yield f"its logits come from {row.pass_kind} pass {row.pass_index}"
    if row.worst_token not in (None, len(prompt.prompt_ids) - 1 + step.step):
        yield f"its logits are of the token at position {row.worst_token}"
    same = step.candidate_token == step.reference_token
    if row.bitwise_equal and not (same and step.candidate_margin == step.reference_margin):
        yield "equal logits, but tokens or margins differ"
    unusable = step.candidate_token is None or step.reference_token is None
    near_tie = both_right and status in ("equal", "within")
    if step.near_tie != (None if same or unusable else near_tie):
        yield f"near_tie is {show(step.near_tie)}, tokens, logits and audits say otherwise"


def audits(receipt: Receipt) -> list[str]:
    """Check the audits of a ``greedy`` receipt and the passes they are of; one without any has none of the fields.

    An engine that could not be audited leaves its side null, which the verdict takes into account.
    """
    passes = receipt["results"].get("passes", [])
    held = {side: (receipt["audit"] or {}).get(side) for side in SIDES}
    if all(audit is None for audit in held.values()):
        return ["passes or diagnoses without an audit"] if passes or receipt["diagnosis"] else []
    result = evidence.greedy_from_json(receipt)
    complaints = list(_audited_passes(result)) if result.prompts else ["audits without a prompt"]
    if complaints:
        return complaints
    absent = {f"the {side} was not audited" for side, audit in held.items() if audit is None}
    return [what for what in audit_consistency.complaints(receipt) if what not in absent]


def _audited_passes(result: GreedyResult) -> Iterator[str]:
    """Check that the first prompt was audited, whole, with one decoded token when there was one."""
    prompt, plan = result.prompts[0], result.audited
    start = 0
    for index, one in enumerate(plan):
        if one.start != start or not one.token_ids or one.kind != pass_kind(len(one.token_ids), start):
            yield f"audited pass {index} does not follow the one before it"
        start += len(one.token_ids)
    fed = tuple(token for one in plan for token in one.token_ids)
    n_prompt = len(prompt.prompt_ids)
    chosen = {(), prompt.candidate_tokens[:1], prompt.reference_tokens[:1]}
    if fed[:n_prompt] != prompt.prompt_ids or fed[n_prompt:] not in chosen:
        yield "the audited passes hold other tokens than the first prompt and the token that follows it"
    if len(prompt.steps) > 1 and len(fed) == n_prompt:
        yield "no decoded token was audited"
