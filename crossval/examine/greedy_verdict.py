"""What a greedy comparison proves: tokens and logits of two engines, and the audit of either one's arithmetic.

Equal tokens say little: an engine with float activations chooses the same ones for a long time. What they prove
depends on the logits (engines that state the same arithmetic give the same bits) and on the audits of one prompt
pass and one decoded token. Pure functions, shared by the receipt's builder, the gate and the tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossval.audit.checks import AuditVerdict
from crossval.audit.products import any_deviates
from crossval.audit.summary import audit_verdict
from crossval.compare.rows import GreedyResult, logits_agree
from crossval.examine.verdict import Agreement, Audits, Verdict, arbitrate
from crossval.passes import PassPlan, n_after
from crossval.receipts.party import SPECIFICATION
from crossval.terms import SIDES, Side


@dataclass(frozen=True)
class PromptAudit:
    """The audits of one prompt: the first, or a later one with other tokens beside the specification."""

    prompt_index: int
    passes: tuple[PassPlan, ...]
    audits: Audits
    diagnoses: Sequence[Mapping[str, Any]] = ()

    @property
    def clean(self) -> bool:
        """Whether every operation of both engines was judged and is right."""
        return is_clean(self.audits)


def is_clean(audits: Audits) -> bool:
    """Return whether both engines were audited and are correct, without which no near tie is known."""
    return all(audit_verdict(audits.get(side)) == "clean" for side in SIDES)


def joint(audits: Audits, further: Sequence[PromptAudit]) -> dict[Side, AuditVerdict]:
    """Return the verdict on each engine: that of the first prompt, or guilty where a later one shows it."""
    found: dict[Side, AuditVerdict] = {}
    for side in SIDES:
        first, *later = (audit_verdict(one.get(side)) for one in (audits, *(one.audits for one in further)))
        found[side] = "guilty" if "guilty" in later else first
    return found


def vouched(side: Side, audits: Audits, exact: bool) -> bool:
    """Return whether an engine that could be audited in part only has its numbers vouched for by the other engine.

    ``exact``: the logits of all steps are bit-identical; when the other engine's audit is complete and
    clean, what reaches the logits of this one is correct, too.
    """
    other: Side = "reference" if side == "candidate" else "candidate"
    partly = audits[side] is not None and audit_verdict(audits[side]) != "guilty"
    return exact and partly and audit_verdict(audits[other]) == "clean"


def only_near_ties(result: GreedyResult, parties: Collection[str], further: Sequence[PromptAudit] = ()) -> bool:
    """Return whether one engine is the specification, and tokens differ in near ties of audited passes only.

    ``parties``: names of both engines. In each prompt an audit has to hold every pass up to the last token that
    differs: then each operation of the other engine, and what its KV cache holds, was recomputed.
    """
    if SPECIFICATION not in parties or not result.prompts:
        return False
    passes = {0: result.audited, **{one.prompt_index: one.passes for one in further if one.clean}}
    n_differing = 0
    for index, prompt in enumerate(result.prompts):
        if len(prompt.steps) < prompt.steps_required:
            return False
        plan = passes.get(index)
        n_decoded = n_after(plan, len(prompt.prompt_ids)) if plan else -1
        for step in prompt.steps:
            differs = step.candidate_token != step.reference_token
            if not logits_agree(step.logits, result.policy):
                return False
            n_differing += differs
            if differs and (step.step > n_decoded or not step.near_tie):
                return False
    return n_differing > 0


def decide(
    agreement: Agreement,
    exact: bool,
    audits: Audits | None,
    *,
    near_ties: bool = False,
    further: Sequence[PromptAudit] = (),
) -> Verdict:
    """Return the verdict of a greedy comparison.

    ``agreement``: of tokens and logits (``crossval.compare.rows.decide_greedy``). ``exact``: the logits of all
    steps have equal bits. ``audits``: None in receipts made before greedy comparisons were audited; there
    equal bits count as parity, as they did then. ``near_ties``: ``only_near_ties``. ``further``: audits of
    later prompts.
    """
    if audits is None:
        if agreement == "agree":
            return "parity" if exact else "incomplete"
        return "divergence" if agreement == "differ" else "incomplete"
    deviates = any(map(any_deviates, (audits, *(one.audits for one in further))))
    if agreement == "agree" and not deviates and any(vouched(side, audits, exact) for side in SIDES):
        return "parity"
    found = joint(audits, further)
    verdict = arbitrate(agreement, found["candidate"], found["reference"], deviates=deviates)
    if near_ties and verdict == "divergence" and set(found.values()) == {"clean"}:
        return "near_ties"
    return "divergence" if agreement == "differ" and verdict == "incomplete" else verdict


def is_exact(parity: Mapping[str, Any]) -> bool:
    """Return whether a receipt's ``parity`` says that all logits are bit-identical."""
    return bool(parity["logits_exact_match_rate"] == 1.0)
