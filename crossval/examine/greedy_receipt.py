"""Receipts of kind ``greedy``: tokens and logits of two engines, and the audits of prompts.

The gate checks what must follow from prompts, steps and audits with the functions that ``GREEDY`` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from crossval.audit import receipt_checks as audit_checks
from crossval.audit.summary import audit_verdict
from crossval.compare import receipt as compared
from crossval.compare import rows as compare
from crossval.compare.receipt import row_from_json, row_to_json
from crossval.compare.rows import GreedyPrompt, GreedyResult, GreedyStep
from crossval.examine import graph, greedy_verdict
from crossval.examine.greedy_verdict import PromptAudit
from crossval.examine.layers_receipt import Diagnoses, within
from crossval.examine.verdict import AGREEMENT, Audits, Verdict
from crossval.model.tolerance import PolicyName
from crossval.passes import pass_kind
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import (
    number,
    plan_conflicts,
    plan_from_json,
    plan_to_json,
    same,
    show,
    vocabulary_conflicts,
)
from crossval.terms import LOGITS, SIDES

SAME_ARITHMETIC = "the logits differ although both engines state the same arithmetic"


@dataclass(frozen=True)
class GreedyExamined:
    """A greedy comparison, and both engines' audits of ``result.audited``."""

    result: GreedyResult
    audits: Audits | None
    """None: a receipt from before greedy comparisons were audited."""
    diagnoses: Diagnoses = ()
    parties: tuple[str, ...] = ()
    """Names of both engines."""
    further: tuple[PromptAudit, ...] = ()


def to_json(found: GreedyExamined) -> dict[str, Any]:
    """Return the fields of the receipt that hold a greedy comparison."""
    result = found.result
    results: dict[str, Any] = {"prompts": [prompt_to_json(prompt) for prompt in result.prompts]}
    if result.audited:
        results["passes"] = plan_to_json(result.audited)
    if found.further:
        results["further"] = [_further_to_json(one) for one in found.further]
    if result.from_journal is not None:
        results["from_journal"] = result.from_journal
    return {
        "thresholds": dict(result.thresholds),
        "results": results,
        "audit": None if found.audits is None else {side: found.audits.get(side) for side in SIDES},
        "diagnosis": list(found.diagnoses),
    }


def _further_to_json(one: PromptAudit) -> dict[str, Any]:
    return {
        "prompt_index": one.prompt_index,
        "passes": plan_to_json(one.passes),
        "audit": {side: one.audits.get(side) for side in SIDES},
        "diagnosis": list(one.diagnoses),
    }


@once
def further_alone(receipt: Receipt) -> dict[int, Receipt]:
    """Return each later prompt that was audited as the receipt that it alone would have, by its index."""
    prompts, found = receipt["results"]["prompts"], {}
    for one in receipt["results"].get("further", ()):
        if one["prompt_index"] < len(prompts):
            prompt = prompts[one["prompt_index"]]
            found[one["prompt_index"]] = Receipt(
                {
                    **receipt,
                    "prompt": {**receipt["prompt"], "text": prompt["text"], "token_ids": prompt["prompt_ids"]},
                    "results": {"prompts": [prompt], "passes": one["passes"]},
                    "audit": one["audit"],
                    "diagnosis": one["diagnosis"],
                }
            )
    return found


def prompt_to_json(prompt: GreedyPrompt) -> dict[str, Any]:
    """Return one prompt as JSON."""
    data = {**vars(prompt)}
    for name in ("prompt_ids", "candidate_tokens", "reference_tokens"):
        data[name] = list(data[name])
    data["steps"] = [
        {
            **vars(step),
            "logits": row_to_json(step.logits),
            "candidate_margin": number(step.candidate_margin),
            "reference_margin": number(step.reference_margin),
        }
        for step in prompt.steps
    ]
    return data


def prompt_from_json(data: Mapping[str, Any]) -> GreedyPrompt:
    """Return the prompt of a receipt that is valid by the schema."""
    steps = tuple(GreedyStep(**{**step, "logits": row_from_json(step["logits"])}) for step in data["steps"])
    lists = {name: tuple(data[name]) for name in ("prompt_ids", "candidate_tokens", "reference_tokens")}
    return GreedyPrompt(**{**data, **lists, "steps": steps})


@once
def from_json(receipt: Receipt) -> GreedyExamined:
    """Return what a valid receipt holds; what follows from prompts and steps is recomputed, not read."""
    results = receipt["results"]
    result = GreedyResult(
        prompts=tuple(prompt_from_json(prompt) for prompt in results["prompts"]),
        thresholds=receipt["thresholds"],
        from_journal=results.get("from_journal"),
        audited=plan_from_json(results.get("passes", ())),
    )
    parties = tuple(receipt[side]["name"] for side in SIDES)
    further = tuple(
        PromptAudit(one["prompt_index"], plan_from_json(one["passes"]), one["audit"], one["diagnosis"])
        for one in results.get("further", ())
    )
    return GreedyExamined(result, receipt.get("audit"), receipt.get("diagnosis") or (), parties, further)


def summarize(found: GreedyExamined) -> Summary:
    """Return first divergence, first inexact step, coverage and parity, computed from the steps."""
    prompts, policy = found.result.prompts, found.result.policy
    rows = [step.logits for prompt in prompts for step in prompt.steps]
    skipped = [
        {
            "prompt_index": index,
            "n_steps": prompt.steps_required - len(prompt.steps),
            "why": prompt.why_incomplete or "not stated",
        }
        for index, prompt in enumerate(prompts)
        if len(prompt.steps) < prompt.steps_required
    ]

    def differs(step: GreedyStep) -> bool:
        return step.candidate_token != step.reference_token or not compare.logits_agree(step.logits, policy)

    return Summary(
        status=found.result.verdict,
        required=sum(prompt.steps_required for prompt in prompts),
        compared=len(rows),
        skipped=skipped,
        exact_match_rate=found.result.exact_match_rate if rows else None,
        cosine=compared.min_cosine(rows),
        logits_exact_match_rate=compared.logits_fraction_equal(rows),
        first_divergence=_first_step(found.result, differs),
        first_inexact=_first_step(found.result, lambda step: compare.row_status(step.logits) != "equal"),
    )


def _first_step(result: GreedyResult, matches: Callable[[GreedyStep], bool]) -> dict[str, Any] | None:
    for index, prompt in enumerate(result.prompts):
        for step in prompt.steps:
            if matches(step):
                return {
                    "prompt_index": index,
                    "step": step.step,
                    "candidate_token": step.candidate_token,
                    "reference_token": step.reference_token,
                    "near_tie": step.near_tie,
                    "explanation": _why(step, result.policy),
                }
    return None


def _why(step: GreedyStep, policy: PolicyName) -> str | None:
    """Return a step's explanation; where only bits differ and must not, that."""
    only_bits = step.candidate_token == step.reference_token and compare.row_status(step.logits) == "within"
    return SAME_ARITHMETIC if only_bits and policy == "same" else step.explanation


def verdict(found: GreedyExamined, summary: Summary) -> Verdict:
    """Return the verdict: tokens, logits and audits together (``crossval.examine.greedy_verdict``)."""
    exact = summary.logits_exact_match_rate == 1.0
    near_ties = greedy_verdict.only_near_ties(found.result, found.parties, found.further)
    return greedy_verdict.decide(
        AGREEMENT[summary.status], exact, found.audits, near_ties=near_ties, further=found.further
    )


# --- checks ---------------------------------------------------------------------------------------------------


def structure(receipt: Receipt) -> list[str]:
    """Check prompts and steps against each other, the model and the settings."""
    result, vocab_size = from_json(receipt).result, receipt["model"]["shape"]["vocab_size"]
    used = [ids for one in result.prompts for ids in (one.prompt_ids, one.candidate_tokens, one.reference_tokens)]
    complaints = vocabulary_conflicts(receipt, *used, *(one.token_ids for one in result.audited))
    if result.prompts and list(result.prompts[0].prompt_ids) != receipt["prompt"]["token_ids"]:
        complaints.append("prompt.token_ids are not those of the first prompt")
    if result.prompts and result.prompts[0].text != receipt["prompt"]["text"]:
        complaints.append("prompt.text is not that of the first prompt")
    if (result.from_journal or 0) > len(result.prompts):
        complaints.append(
            f"results.from_journal is {result.from_journal}, there are {len(result.prompts)} prompts"
        )
    indices = [one.prompt_index for one in from_json(receipt).further]
    if indices != sorted({*indices} & {*range(1, len(result.prompts))}):
        complaints.append("results.further is not of later prompts, each once and in their order")
    both_correct = _both_correct(receipt)
    for index, prompt in enumerate(result.prompts):
        complaints += [f"prompt {index}: {what}" for what in _prompt_conflicts(prompt, vocab_size, both_correct)]
        if prompt.steps_required != receipt["settings"]["n_steps"]:
            complaints.append(
                f"prompt {index}: steps_required is {prompt.steps_required}, "
                f"settings.n_steps is {show(receipt['settings']['n_steps'])}"
            )
    return complaints


def _both_correct(receipt: Receipt) -> bool:
    """Return whether both engines were audited and nothing is wrong, without which no near tie is known."""
    found = from_json(receipt)
    later = any("guilty" in map(audit_verdict, one.audits.values()) for one in found.further)
    return greedy_verdict.is_clean(found.audits or {}) and not later


def _prompt_conflicts(prompt: GreedyPrompt, vocab_size: int, both_correct: bool) -> Iterator[str]:
    if not prompt.prompt_ids:
        yield "no prompt tokens"
    if [step.step for step in prompt.steps] != list(range(len(prompt.steps))):
        yield "steps are missing, repeated or out of order"
    lengths = (len(prompt.steps), len(prompt.candidate_tokens), len(prompt.reference_tokens))
    if max(lengths) > prompt.steps_required:
        yield f"{max(lengths)} steps or tokens, {prompt.steps_required} required"
    for step in prompt.steps:
        yield from (
            f"step {step.step}: {what}" for what in _step_conflicts(prompt, step, vocab_size, both_correct)
        )
    differs = [step.step for step in prompt.steps if step.candidate_token != step.reference_token]
    if prompt.first_divergence != (differs[0] if differs else None):
        yield f"first_divergence is {show(prompt.first_divergence)}, the steps say {differs[:1]}"
    # Up to the first difference both engines run freely in the same context; after it, one is led by the other.
    together = prompt.steps[: differs[0] + 1] if differs else prompt.steps
    for side in SIDES:
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


def _step_conflicts(prompt: GreedyPrompt, step: GreedyStep, vocab_size: int, both_correct: bool) -> Iterator[str]:
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
    near_tie = both_correct and status in ("equal", "within")
    if step.near_tie != (None if same or unusable else near_tie):
        yield f"near_tie is {show(step.near_tie)}, tokens, logits and audits say otherwise"


def audits(receipt: Receipt) -> list[str]:
    """Check the audits and the passes they are of; a receipt without any has none of the fields.

    An engine that could not be audited leaves its side null, which the verdict takes into account.
    """
    further = further_alone(receipt).items()
    return [
        *_audits_of_one(receipt),
        *(f"prompt {index}: {what}" for index, one in further for what in _audits_of_one(one)),
    ]


def _audits_of_one(receipt: Receipt) -> list[str]:
    passes = receipt["results"].get("passes", [])
    held = {side: (receipt["audit"] or {}).get(side) for side in SIDES}
    if all(audit is None for audit in held.values()):
        return ["passes or diagnoses without an audit"] if passes or receipt["diagnosis"] else []
    result = from_json(receipt).result
    complaints = list(_audited_passes(result)) if result.prompts else ["audits without a prompt"]
    if complaints:
        return complaints
    absent = {f"the {side} was not audited" for side, audit in held.items() if audit is None}
    return [what for what in audit_checks.complaints(receipt) if what not in absent]


def _audited_passes(result: GreedyResult) -> Iterator[str]:
    """Check that the first prompt was audited, whole, with a decoded token when there was one, or with several."""
    prompt, plan = result.prompts[0], result.audited
    yield from plan_conflicts(plan, "audited pass")
    fed = tuple(token for one in plan for token in one.token_ids)
    n_prompt = len(prompt.prompt_ids)
    n_decoded = min(max(0, len(fed) - n_prompt), len(prompt.steps) - 1)
    chosen = {(), prompt.candidate_tokens[:n_decoded], prompt.reference_tokens[:n_decoded]}
    if fed[:n_prompt] != prompt.prompt_ids or fed[n_prompt:] not in chosen:
        yield "the audited passes hold other tokens than the first prompt and those that follow it"
    if len(prompt.steps) > 1 and len(fed) == n_prompt:
        yield "no decoded token was audited"


def amount(receipt: Receipt) -> Amount:
    """Return how many logits of how many steps were compared."""
    rows = [row for _, row in compared.rows_of(receipt)]
    n_elements = sum(row.n_elements for row in rows)
    return Amount(n_elements, len(rows), f"{len(rows)} rows, {n_elements} elements, {len(rows)} steps")


def demands(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check that both engines are correct; bit-identical logits make one engine's clean audit enough for both.

    A receipt from before greedy comparisons were audited shows bit-identical logits or nothing.
    """
    yield from graph.demands(receipt, policy)
    held, exact = receipt["audit"], greedy_verdict.is_exact(receipt["parity"])
    if held is None:
        shown = "all logits are bit-equal" if exact else "the arithmetic was not checked"
        detail = f"none, made before greedy comparisons were audited; {shown}"
        yield GateCheck("arithmetic", exact, detail)
        return
    for side in SIDES:
        vouched = audit_verdict(held[side]) != "clean" and greedy_verdict.vouched(side, held, exact)
        yield from audit_checks.demands(side, held[side], policy, vouched=vouched)
        for index, alone in further_alone(receipt).items():
            for check in audit_checks.demands(side, alone["audit"][side], policy):
                yield replace(check, name=f"{check.name}, prompt {index}")


GREEDY = Kind[GreedyExamined](
    name="greedy",
    counted="tokens",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    verdict=verdict,
    passing="parity",
    checks={"thresholds": compared.thresholds, "structure": structure, **compared.ROW_CHECKS},
    further_checks=lambda receipt: {"audits": audits},
    amount=amount,
    demands=demands,
    exactness=compared.exactness,
    within=within,
)
