"""The audits and diagnoses of a receipt for people: a line per engine, what is guilty and why, what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.arbitrate import ADVICE
from crossval.audit import precision, summary
from crossval.audit.consistency import UNDETERMINED
from crossval.audit.summary import AuditRow
from crossval.console import plain, show_line
from crossval.receipt import Receipt

SIDES = ("candidate", "reference")
_STYLE = {"clean": "green", "within": "bold yellow", "guilty": "bold red", "incomplete": "bold yellow"}


def show_audits(out: Console, receipt: Receipt) -> None:
    """Print a line per engine, and what explains each guilty operation."""
    if receipt["audit"] is None:
        return
    show_line(
        out, "\nEvery operation recomputed from the engine's own inputs, held to the bound of right arithmetic."
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
    for found in receipt["diagnosis"] or ():
        show_line(out, f"diagnosis  {found['party']}: {cause(found)}")
        show_line(out, f"reproduce  {found['command']}")


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
    n_checks = sum(row.n_passes - row.n_unchecked for row in rows)
    pieces = f", in {n_checks} pieces" if n_checks < audit["n_covered"] else ""
    counts = f"{audit['n_covered']} of {audit['n_ops']} operations within their bounds{pieces}"
    worst = max((row for row in rows if row.ratio is not None), key=lambda row: row.ratio or 0.0, default=None)
    extreme = "" if worst is None else f", worst {worst.ratio:.2g} of its bound ({worst.tap})"
    return f"{counts}{extreme}{_flips(rows)}{_unchecked(rows)}"


def _flips(rows: Sequence[AuditRow]) -> str:
    flips = sum(row.flips for row in rows)
    return f"; {flips} int8 values at rounding ties fell the other way" if flips else ""


def _unchecked(rows: Sequence[AuditRow]) -> str:
    unchecked = [row for row in rows if summary.status_of(row) == "unchecked"]
    return f"; not judged: {unchecked[0].tap}: {unchecked[0].note}" if unchecked else ""


def place(found: Mapping[str, Any]) -> str:
    """Return where a guilty operation is, in words."""
    layer = "" if found["layer"] is None else f"layer {found['layer']}, "
    return f"{layer}op {found['op']} (pass {found['pass_index']}, {found['pass_kind']})"


def guilty_line(found: Mapping[str, Any]) -> str:
    """Return a guilty operation with its worst element, how far it is off, and how many are."""
    parts = [place(found)]
    if found["n_ops"] > 1:
        parts[0] += f", the last of {found['n_ops']} operations judged as one"
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
    if found["op"] in ("kq", "kq_soft_max"):
        return "head", "key"
    return ("head", "feature") if len(found["worst"]["index"]) == 2 else ("feature",)


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


def show_advice(out: Console, receipt: Receipt) -> None:
    """Print what the verdict means and what to do next."""
    advice, within = ADVICE[receipt["verdict"]], precision.within(receipt)
    limit = f" This is seen at the precision of {within} only." if within else ""
    show_line(out, f"meaning    {advice.meaning}{limit}")
    show_line(out, f"next step  {advice.next_step}")
