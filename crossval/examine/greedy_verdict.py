"""What a greedy comparison proves: tokens and logits of two engines, and the audit of either one's arithmetic.

Equal tokens say little: an engine with float activations chooses the same ones for a long time. What they prove
depends on the logits (engines that state the same arithmetic give the same bits) and on the audits of one prompt
pass and one decoded token. Pure functions, shared by the receipt's builder, the gate and the tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from crossval.audit.products import any_deviates
from crossval.audit.summary import audit_verdict
from crossval.compare.rows import GreedyResult, logits_agree
from crossval.examine.verdict import Agreement, Audits, Verdict, arbitrate
from crossval.passes import n_after
from crossval.receipts.party import SPECIFICATION
from crossval.terms import SIDES, Side


def vouched(side: Side, audits: Audits, exact: bool) -> bool:
    """Return whether an engine that could be audited in part only has its numbers vouched for by the other engine.

    ``exact``: the logits of all steps are bit-identical; when the other engine's audit is complete and
    clean, what reaches the logits of this one is correct, too.
    """
    other: Side = "reference" if side == "candidate" else "candidate"
    partly = audits[side] is not None and audit_verdict(audits[side]) != "guilty"
    return exact and partly and audit_verdict(audits[other]) == "clean"


def only_near_ties(result: GreedyResult, parties: Collection[str]) -> bool:
    """Return whether one engine is the specification, and tokens differ in near ties of audited passes only.

    ``parties``: names of both engines. The audit has to hold every pass up to the last token that differs, in the
    first prompt: then each operation of the other engine, and what its KV cache holds, was recomputed.
    """
    if SPECIFICATION not in parties or not result.prompts:
        return False
    n_differing = 0
    n_decoded = n_after(result.audited, len(result.prompts[0].prompt_ids)) if result.audited else -1
    for index, prompt in enumerate(result.prompts):
        if len(prompt.steps) < prompt.steps_required:
            return False
        for step in prompt.steps:
            differs = step.candidate_token != step.reference_token
            if not logits_agree(step.logits, result.policy):
                return False
            n_differing += differs
            if differs and (index or step.step > n_decoded or not step.near_tie):
                return False
    return n_differing > 0


def decide(agreement: Agreement, exact: bool, audits: Audits | None, *, near_ties: bool = False) -> Verdict:
    """Return the verdict of a greedy comparison.

    ``agreement``: of tokens and logits (``crossval.compare.rows.decide_greedy``). ``exact``: the logits of all
    steps have equal bits. ``audits``: None in receipts made before greedy comparisons were audited; there
    equal bits count as parity, as they did then. ``near_ties``: ``only_near_ties``.
    """
    if audits is None:
        if agreement == "agree":
            return "parity" if exact else "incomplete"
        return "divergence" if agreement == "differ" else "incomplete"
    deviates = any_deviates(audits)
    if agreement == "agree" and not deviates and any(vouched(side, audits, exact) for side in SIDES):
        return "parity"
    found = [audit_verdict(audits[side]) for side in SIDES]
    verdict = arbitrate(agreement, *found, deviates=deviates)
    if near_ties and verdict == "divergence" and set(found) == {"clean"}:
        return "near_ties"
    return "divergence" if agreement == "differ" and verdict == "incomplete" else verdict


def is_exact(parity: Mapping[str, Any]) -> bool:
    """Return whether a receipt's ``parity`` says that all logits are bit-identical."""
    return bool(parity["logits_exact_match_rate"] == 1.0)
