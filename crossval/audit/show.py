"""The audits and diagnoses of a receipt for people: a line per engine, what is guilty and why, what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.audit import extent, precision, summary
from crossval.audit.receipt_checks import UNDETERMINED
from crossval.audit.summary import AuditRow
from crossval.examine.verdict import ADVICE, Advice
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.receipts.file import Receipt
from crossval.reports.console import plain, show_line

SIDES = ("candidate", "reference")
_STYLE = {"clean": "green", "within": "bold yellow", "guilty": "bold red", "incomplete": "bold yellow"}


def show_audits(out: Console, receipt: Receipt) -> None:
    """Print a line per engine, and what explains each guilty operation."""
    if receipt["audit"] is None:
        return
    show_line(
        out, "\nEvery operation recomputed from the engine's own inputs and checked against its error bound."
    )
    width = max(len(receipt[side]["name"]) for side in SIDES)
    for side in SIDES:
        audit = receipt["audit"][side]
        verdict = summary.audit_verdict(audit)
        text = "not audited" if audit is None else audit_line(audit, receipt["model"]["shape"]["n_layers"])
        head = f"{side:10} {plain(receipt[side]['name']):{width}}  "
        out.print(Text.assemble(head, (plain(text), _STYLE[verdict])), soft_wrap=True)
        if audit is not None and "precision" in audit:
            show_line(out, f"precision  {side}: {precision.sentence(audit['precision'])}")
    for side, found in misrecorded(receipt):
        show_line(out, f"recording  {side}: {recording_line(found)}")
    for found in receipt["diagnosis"] or ():
        show_line(out, f"diagnosis  {found['party']}: {cause(found)}")
        show_line(out, f"reproduce  {found['command']}")


def misrecorded(receipt: Receipt) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what was recorded wrongly of which engine."""
    audits = receipt["audit"] or {}
    return [(side, one) for side in SIDES for one in (audits.get(side) or {}).get("misrecorded", ())]


def recording_line(found: Mapping[str, Any]) -> str:
    """Return what was recorded wrongly in a line: which tensors, how that is known, what to change."""
    return f"RECORDED WRONGLY: {what_recorded(found)}; {found['explanation']}; {found['remedy']}"


def what_recorded(found: Mapping[str, Any]) -> str:
    """Return tensors and passes in words: ``q of layers 0 to 3, passes 0 to 2``."""
    passes = extent.numbers("pass", found["passes"])
    if found["kind"] != "tap":
        return f"the order of {passes}" if found["kind"] == "order" else f"the tokens of {passes}"
    parsed = [taps.parse(tap) for tap in found["taps"]]
    layers = sorted({one.layer for one in parsed if one.layer is not None})
    names = ", ".join(dict.fromkeys(one.tap for one in parsed))
    where = f" of {extent.numbers('layer', layers)}" if layers else ""
    return f"{names}{where}, {passes}"


def audit_line(audit: Mapping[str, Any], n_layers: int) -> str:
    """Return one engine's audit in a line: all is within its bound, or what is guilty, or what is missing."""
    rows = [summary.row_from_json(row) for row in audit["rows"]]
    if audit["first_guilty"] is not None:
        n_guilty = sum(summary.status_of(row) in ("guilty", "invalid") for row in rows)
        more = f"; {n_guilty - 1} more tensors are beyond their bounds" if n_guilty > 1 else ""
        return f"GUILTY  {guilty_line(audit['first_guilty'])}{more}"
    within = summary.within_of(audit)
    if summary.audit_verdict(audit) == "within":
        n_within = sum(row.n_within for row in rows)
        return (
            f"agrees within {within:.2g} (relative L2): {n_within} tokens of segments were not explained; "
            f"not checked below that; record {summary.unsettled(rows, n_layers)}"
        )
    counts = f"{_counts(audit)} within their bounds"
    worst = max((row for row in rows if row.ratio is not None), key=lambda row: row.ratio or 0.0, default=None)
    extreme = "" if worst is None else f", worst {worst.ratio:.2g} of its bound ({worst.tap})"
    return f"{counts}{extreme}{_flips(rows)}{_unchecked(rows)}"


def _counts(audit: Mapping[str, Any]) -> str:
    """Return how many operations were judged, and how: one by one, or inside segments."""
    found = summary.depth(audit)
    if not found.n_segments:
        return f"{audit['n_covered']} of {audit['n_ops']} operations"
    segments = "one segment" if found.n_segments == 1 else f"{found.n_segments} segments"
    one_by_one = f"{found.n_single} of {audit['n_ops']} operations checked one by one"
    return f"{one_by_one}, {found.n_inside} inside {segments}, all"


def _flips(rows: Sequence[AuditRow]) -> str:
    flips = sum(row.flips for row in rows)
    return f"; {flips} int8 values at rounding ties fell the other way" if flips else ""


def _unchecked(rows: Sequence[AuditRow]) -> str:
    unchecked = [row for row in rows if summary.status_of(row) == "unchecked"]
    return f"; not judged: {unchecked[0].tap}: {unchecked[0].note}" if unchecked else ""


def place(found: Mapping[str, Any]) -> str:
    """Return where a guilty operation is, in words."""
    return f"{extent.where(found)} (pass {found['pass_index']}, {found['pass_kind']})"


def seen_at(receipt: Receipt, location: Mapping[str, Any]) -> str:
    """Return where the engines are first seen to differ: an operation, or all that lies behind the one before."""
    name = taps.parse(location["tap"])
    rows = (receipt["audit"] or {}).get("reference") or {"rows": []}
    known = {taps.parse(row["tap"]).tap for row in [*rows["rows"], *receipt["results"]["rows"]]}
    n_layers = receipt["model"]["shape"]["n_layers"]
    segment = None
    if "after" in location:
        segment = extent.behind(location["tap"], location["after"], n_layers, OPTIONAL_TAPS - known)
    return extent.where({"layer": name.layer, "op": name.tap, "segment": segment})


def guilty_line(found: Mapping[str, Any]) -> str:
    """Return a guilty operation with its worst element, how far it is off, and how many are."""
    parts = [place(found)]
    if found["n_ops"] > 1:
        parts[0] += f", the last of {found['n_ops']} operations judged as one"
    if found.get("segment") is not None:
        parts[0] += f"; record {extent.narrower(found['segment'])} to come nearer"
    worst = found["worst"]
    if worst is not None:
        at = ", ".join(f"{name} {value}" for name, value in zip(_axes(found), worst["index"], strict=False))
        values = f"recorded {worst['recorded']:.9g}, expected {worst['expected']:.9g}"
        parts.append(f"position {worst['token']}, {at}: {values}, {_times(found)}")
    if found["n_beyond"]:
        unit = "tokens" if found["n_ops"] > 1 else f"of {found['n_elements']} values"
        parts.append(f"{found['n_beyond']} {unit} are beyond it")
    if found["flips"]:
        parts.append(f"{found['flips']} int8 flips explained")
    if found["status"] == "invalid":
        parts.append(found["note"] or "invalid")
    elif "overflow" in (found["note"] or ""):
        parts.append(found["note"])
    return "; ".join(parts)


def _axes(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the indices of an element count."""
    return tuple(name for name in taps.axis_names(found["tap"]) if name != "token")


def _times(found: Mapping[str, Any]) -> str:
    if found["ratio"] is None:
        return "which has to be exact"
    return f"{found['ratio']:.3g} times the bound"


def cause(found: Mapping[str, Any]) -> str:
    """Return a diagnosis in a line: the name, what it means, how well it fits and how much worse the next does."""
    if found["name"] == UNDETERMINED:
        return f"{UNDETERMINED}: {found['explanation']}"
    fit = f"fits to {found['ratio']:.2g}, the specification to {found['specification_ratio']:.2g}"
    if found["runner_up"] is not None:
        fit += f", next best ({found['runner_up']}) to {found['runner_up_ratio']:.2g}"
    family = "" if found["family"] is None else f" ({found['family']})"
    return f"{found['name']}{family}: {found['explanation'].rstrip('.')}; {fit}"


_RECORD_ANEW = Advice(
    "Nothing is proven against either engine: a recording is wrong, and all that is around it fits without it.",
    "Change the recording as said above, record anew, and run this again.",
)


def segmented(receipt: Receipt) -> bool:
    """Return whether any operation of either engine was judged inside a segment only."""
    audits = receipt["audit"] or {}
    return any(summary.depth(audits[side]).n_segments for side in SIDES if audits.get(side))


def before(audit: Mapping[str, Any]) -> str:
    """Return what is known of the operations before the first guilty one."""
    found = audit["first_guilty"]
    at = found["pass_index"], summary.execution_index(found["tap"])
    rows = [summary.row_from_json(row) for row in audit["rows"]]
    # a row is about all passes: of later passes' operations nothing is claimed
    earlier = [row for row in rows if found["pass_index"] or summary.execution_index(row.tap) < at[1]]
    if any(row.n_unchecked for row in earlier):
        return "not everything before it was judged"
    if any(row.segments for row in earlier):
        return "what lies before it was judged in segments, not operation by operation"
    return "everything before it is right"


def advice_of(receipt: Receipt) -> Advice:
    """Return what the verdict means and what to do next, no more than the audits show."""
    if receipt["verdict"] == "incomplete" and misrecorded(receipt):
        return _RECORD_ANEW
    advice, limits = _advice(receipt), []
    precise = precision.within(receipt)
    if precise:
        limits.append(f" This is seen at the precision of {precise} only.")
    other = _ACQUITTED.get(receipt["verdict"])
    if other and summary.audit_verdict((receipt["audit"] or {}).get(other)) == "within":
        limits.append(f" Of the {other} this is shown only within the distance stated.")
    return replace(advice, meaning=advice.meaning + "".join(limits))


_ACQUITTED = {"candidate_defect": "reference", "reference_defect": "candidate"}
"""Verdict -> the side it says is right."""


def _advice(receipt: Receipt) -> Advice:
    verdict, audits = receipt["verdict"], receipt["audit"] or {}
    advice = ADVICE[verdict]
    if verdict == "parity" and segmented(receipt):
        counts = [f"{side}: {_counts(audits[side])} within their bounds" for side in SIDES]
        agree = "Both engines agree with each other, and with the specification as far as they were checked"
        return replace(advice, meaning=f"{agree}: {'; '.join(counts)}.")
    if verdict == "divergence" and segmented(receipt):
        return Advice(
            "The engines differ from each other, but every operation or segment of each is within its bounds "
            "given its own inputs.",
            f"{advice.next_step.rstrip('.')}, or inside a segment: record every tap to look into it.",
        )
    if verdict == "candidate_defect" and (audits.get("candidate") or {}).get("first_guilty"):
        first = audits["candidate"]["first_guilty"]
        what = "the operation named above" if first["n_ops"] == 1 else f"the mistake in {extent.where(first)},"
        return replace(advice, next_step=f"Fix {what} in the candidate; {before(audits['candidate'])}.")
    if verdict == "reference_defect" and (audits.get("reference") or {}).get("first_guilty"):
        first = audits["reference"]["first_guilty"]
        if first["n_ops"] > 1:
            step = f"The mistake is in {extent.where(first)}: find it before you report it."
            return replace(advice, next_step=f"Do not change the candidate. {step}")
    return advice


def show_advice(out: Console, advice: Advice) -> None:
    """Print what the verdict means and what to do next."""
    show_line(out, f"meaning    {advice.meaning}")
    show_line(out, f"next step  {advice.next_step}")
