"""Candidate, reference and specification: one verdict on which of the two engines is wrong, or what they share.

The harness never assumes that the reference is correct: candidate and reference are compared with each other, and
each is audited against the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossval.audit.checks import AuditVerdict
from crossval.terms import Side

Verdict = Literal[
    "parity",
    "agrees_within",
    "shared_deviation",
    "reference_defect",
    "candidate_defect",
    "both_differ",
    "divergence",
    "deviates",
    "near_ties",
    "incomplete",
]
Agreement = Literal["agree", "differ", "not_compared"]
AGREEMENT: dict[str, Agreement] = {"parity": "agree", "divergence": "differ", "incomplete": "not_compared"}
"""Outcome of the direct comparison of two engines (``crossval.compare.rows.Parity``) -> what it means here."""
Audits = Mapping[Side, Mapping[str, Any] | None]
"""Each engine's audit as ``crossval.audit.summary.to_json`` gives it; None: not audited."""


@dataclass(frozen=True)
class Advice:
    """What a verdict means for a person, and what to do next."""

    meaning: str
    next_step: str


ADVICE: dict[Verdict, Advice] = {
    "parity": Advice(
        "Both engines agree with each other and with the specification.",
        "If the text is still bad, the model, its conversion, the prompt template or the sampling is the cause.",
    ),
    "agrees_within": Advice(
        "Both engines agree with each other and with the specification within the distance stated; an error "
        "smaller than that was not looked for, because too little was recorded.",
        "Record the tensors named above and compare again, or accept the distance: crossval gate --accept-within.",
    ),
    "shared_deviation": Advice(
        "Both engines agree with each other, and both differ from the specification in the same place.",
        "Suspect what they share: weights converted wrongly, a wrong header value, or a bug that was ported.",
    ),
    "reference_defect": Advice(
        "The reference is wrong: the candidate does what the model defines.",
        "Do not change the candidate. Report the operation named above to the reference's authors.",
    ),
    "candidate_defect": Advice(
        "The candidate is wrong: the reference does what the model defines.",
        "Fix the operation named above in the candidate; everything before it is correct.",
    ),
    "both_differ": Advice(
        "Both engines differ from the specification, each in its own way.",
        "Check first what both are given: tokenizer, configuration, weight layout of the file.",
    ),
    "divergence": Advice(
        "The engines differ from each other, but every operation of each is correct given its own inputs.",
        "The difference entered before the first operation or through the state: tokens, positions, KV cache.",
    ),
    "deviates": Advice(
        "No operation is wrong as it is stated or was found to be computed. But that is not what the model "
        "defines.",
        "Accept it where it is meant (crossval gate --allow-deviation), or compute what the model defines.",
    ),
    "near_ties": Advice(
        "Tokens differ from the specification's, but every operation of the engine was recomputed, in all passes "
        "up to the last token that differs, and is within its bound: those choices were near ties, which rounding "
        "decides. This is an audit of one engine, not parity of two.",
        "Nothing is wrong in these passes. For parity, compare with real bitnet.cpp, live or recorded.",
    ),
    "incomplete": Advice(
        "Something that had to be compared was not.",
        "See the coverage below: record the missing tensors, or run both engines live.",
    ),
}


def weaker(captured: Verdict, default_run: Verdict) -> Verdict:
    """Return the verdict of two runs of the same engines: what the first found, or else what the second did."""
    strength: dict[Verdict, int] = {"parity": 3, "agrees_within": 2, "deviates": 1}
    return min(captured, default_run, key=lambda verdict: strength.get(verdict, 0))


def arbitrate(
    agreement: Agreement, candidate: AuditVerdict, reference: AuditVerdict, *, deviates: bool = False
) -> Verdict:
    """Return the verdict of three parties.

    ``agreement``: of candidate and reference, end to end. An engine whose audit is ``clean`` agrees with the
    specification; one that is ``within`` agrees as far as its recording can show. Anything not compared leaves the
    verdict ``incomplete``, unless a defect is already proven on the one side while the other side agrees.
    ``deviates``: an engine computes otherwise than the model defines, as it states or as was found in all of its
    projections, and was judged as such: whether the two agree or differ then says nothing about the model.
    """
    agreeing = ("clean", "within")
    if candidate == "guilty" and reference in agreeing:
        return "candidate_defect"
    if reference == "guilty" and candidate in agreeing:
        return "reference_defect"
    if candidate == reference == "guilty":
        if agreement == "not_compared":
            return "incomplete"
        return "shared_deviation" if agreement == "agree" else "both_differ"
    if "incomplete" in (candidate, reference) or agreement == "not_compared":
        return "incomplete"
    if deviates:
        return "deviates"
    if agreement == "differ":
        return "divergence"
    return "agrees_within" if "within" in (candidate, reference) else "parity"
