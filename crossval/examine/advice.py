"""What a verdict means and what to do next, in no more words than the audits allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from crossval.audit import extent, precision, summary
from crossval.audit.show import before, counts, misrecorded, segmented
from crossval.console import show_line
from crossval.examine.verdict import ADVICE, Advice
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict, sides_and_counts
from crossval.terms import SIDES

MAX_SKIPS_SHOWN = 5

_RECORD_ANEW = Advice(
    "Nothing is proven against either engine: a recording is wrong, and everything around it passes without it.",
    "Change the recording as described above, record again, and rerun this.",
)


def advice_of(receipt: Receipt) -> Advice:
    """Return what the verdict means and what to do next, no more than the audits show."""
    if receipt["verdict"] == "incomplete" and misrecorded(receipt):
        return _RECORD_ANEW
    advice, limits = _advice(receipt), []
    precise = precision.within(receipt)
    if precise:
        limits.append(f" This is seen at the precision of {precise} only.")
    other = _CORRECT_SIDE.get(receipt["verdict"])
    if other and summary.audit_verdict((receipt["audit"] or {}).get(other)) == "within":
        limits.append(f" Of the {other} this is shown only within the distance stated.")
    return replace(advice, meaning=advice.meaning + "".join(limits))


_CORRECT_SIDE = {"candidate_defect": "reference", "reference_defect": "candidate"}
"""Verdict -> the side that it states is correct."""


def _advice(receipt: Receipt) -> Advice:
    verdict, audits = receipt["verdict"], receipt["audit"] or {}
    advice = ADVICE[verdict]
    if verdict == "parity" and segmented(receipt):
        judged = [f"{side}: {counts(audits[side])} within their bounds" for side in SIDES]
        agree = "Both engines agree with each other, and with the specification as far as they were checked"
        return replace(advice, meaning=f"{agree}: {'; '.join(judged)}.")
    if verdict == "divergence" and segmented(receipt):
        return Advice(
            "The engines differ from each other, but every operation or segment of each is within its bounds "
            "given its own inputs.",
            f"{advice.next_step.rstrip('.')}, or inside a segment: record every tap to look into it.",
        )
    if verdict == "candidate_defect" and (audits.get("candidate") or {}).get("first_guilty"):
        first = audits["candidate"]["first_guilty"]
        what = "the operation named above" if first["n_ops"] == 1 else f"the error in {extent.where(first)},"
        return replace(advice, next_step=f"Fix {what} in the candidate; {before(audits['candidate'])}.")
    if verdict == "reference_defect" and (audits.get("reference") or {}).get("first_guilty"):
        first = audits["reference"]["first_guilty"]
        if first["n_ops"] > 1:
            step = f"The error is in {extent.where(first)}: find it before you report it."
            return replace(advice, next_step=f"Do not change the candidate. {step}")
    return advice


def show_conclusion(
    out: Console,
    receipt: Receipt,
    counts: str,
    advice: Advice,
    where: Callable[[Receipt, Mapping[str, Any]], str],
    skip: Callable[[Mapping[str, Any]], str],
) -> None:
    """Print the verdict, what it means and what to do next, where engines first differ, what was not compared.

    ``counts``: shown beside the verdict. ``where`` and ``skip`` name a first difference and a skipped comparison.
    """
    verdict = receipt["verdict"]
    within = precision.within(receipt) if verdict == "parity" else None
    text = sides_and_counts(receipt) + ("" if within is None else f", within {within}")
    show_verdict(out, verdict, text + counts)
    show_line(out, f"meaning    {advice.meaning}")
    show_line(out, f"next step  {advice.next_step}")
    first, inexact = receipt["first_divergence"], receipt["first_inexact"]
    if first is not None:
        show_line(out, f"first divergence: {where(receipt, first)}")
    if inexact is not None and inexact != first:
        show_line(out, f"first inexact bits: {where(receipt, inexact)}")
    skipped = receipt["coverage"]["skipped"]
    for one in skipped[:MAX_SKIPS_SHOWN]:
        show_line(out, f"not compared: {skip(one)}: {one['why']}")
    if len(skipped) > MAX_SKIPS_SHOWN:
        show_line(out, f"not compared: {len(skipped) - MAX_SKIPS_SHOWN} more")
