"""The audits and diagnoses of a receipt for people: a line per engine, what is wrong and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.audit import extent, precision, products, summary
from crossval.audit.checks import WRONG
from crossval.audit.diagnosis_checks import UNDETERMINED
from crossval.console import plain, show_line
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.receipts.file import Receipt
from crossval.terms import SIDES, Side

_STYLE = {"clean": "green", "within": "bold yellow", "guilty": "bold red", "incomplete": "bold yellow"}


def show_audits(out: Console, receipt: Receipt) -> None:
    """Print a line per engine, and what explains each wrong operation."""
    if receipt["audit"] is None:
        return
    how = list(computes(receipt))
    if how:
        show_line(out, "")
    for label, side, text in how:
        show_line(out, f"{label:10} {side}: {text}")
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
    for side, found in misrecorded(receipt):
        show_line(out, f"recording  {side}: {recording_line(found)}")
    for found in receipt["diagnosis"] or ():
        show_line(out, f"diagnosis  {found['party']}: {cause(found)}")
        show_line(out, f"reproduce  {found['command']}")


def computes(receipt: Receipt) -> Iterator[tuple[str, Side, str]]:
    """Yield how each engine computes where that is not as expected: a label, the side, and a sentence."""
    for side in SIDES:
        audit = (receipt["audit"] or {}).get(side) or {}
        if "precision" in audit:
            yield "precision", side, precision.sentence(audit["precision"])
        if "products" in audit:
            yield "deviation", side, products.sentence(audit["products"])


def misrecorded(receipt: Receipt) -> list[tuple[Side, Mapping[str, Any]]]:
    """Return the recording errors of a receipt, with the side that they are of."""
    audits = receipt["audit"] or {}
    return [(side, one) for side in SIDES for one in (audits.get(side) or {}).get("misrecorded", ())]


def recording_line(found: Mapping[str, Any]) -> str:
    """Return a recording error in a line: which tensors, how that is known, what to change."""
    return f"RECORDED INCORRECTLY: {what_recorded(found)}; {found['explanation']}; {found['remedy']}"


def what_recorded(found: Mapping[str, Any]) -> str:
    """Return tensors and passes in words: ``q of layers 0 to 3, passes 0 to 2``."""
    passes = extent.numbers("pass", found["passes"])
    if found["kind"] != "tap":
        return f"the order of {passes}" if found["kind"] == "order" else f"the tokens of {passes}"
    layers = extent.layers_of(found["taps"])
    names = ", ".join(dict.fromkeys(taps.parse(tap).tap for tap in found["taps"]))
    where = f" of {extent.numbers('layer', layers)}" if layers else ""
    return f"{names}{where}, {passes}"


def audit_line(audit: Mapping[str, Any], n_layers: int) -> str:
    """Return one engine's audit in a line: all is within its bound, or what is wrong, or what is missing."""
    rows = [summary.row_from_json(row) for row in audit["rows"]]
    if audit["first_guilty"] is not None:
        n_wrong = sum(summary.status_of(row) in WRONG for row in rows)
        more = f"; {n_wrong - 1} more tensors exceed their bounds" if n_wrong > 1 else ""
        return f"WRONG  {wrong_line(audit['first_guilty'])}{more}"
    within = summary.within_of(audit)
    if summary.audit_verdict(audit) == "within":
        n_within = sum(row.n_within for row in rows)
        return (
            f"agrees within {within:.2g} (relative L2): {n_within} tokens of segments were not explained; "
            f"not checked below that; record {summary.unsettled(rows, n_layers)}"
        )
    worst = max((row for row in rows if row.ratio is not None), key=lambda row: row.ratio or 0.0, default=None)
    extreme = "" if worst is None else f", worst {worst.ratio:.2g} of its bound ({worst.tap})"
    n_flips = sum(row.flips for row in rows)
    flips = f"; {n_flips} int8 values rounded the other way at ties" if n_flips else ""
    unchecked = [f"; not judged: {row.tap}: {row.note}" for row in rows if summary.status_of(row) == "unchecked"]
    return f"{counts(audit)} within their bounds{extreme}{flips}{''.join(unchecked[:1])}"


def counts(audit: Mapping[str, Any]) -> str:
    """Return how many operations were judged, by themselves or inside segments."""
    found = summary.depth(audit)
    if not found.n_segments:
        return f"{audit['n_covered']} of {audit['n_ops']} operations"
    segments = "one segment" if found.n_segments == 1 else f"{found.n_segments} segments"
    one_by_one = f"{found.n_single} of {audit['n_ops']} operations checked one by one"
    return f"{one_by_one}, {found.n_inside} inside {segments}, all"


def place(found: Mapping[str, Any]) -> str:
    """Return where a wrong operation is, in words."""
    return f"{extent.where(found)} (pass {found['pass_index']}, {found['pass_kind']})"


def seen_at(receipt: Receipt, location: Mapping[str, Any]) -> str:
    """Return where the engines first differ: an operation, or all that follow the last one compared before."""
    name = taps.parse(location["tap"])
    rows = (receipt["audit"] or {}).get("reference") or {"rows": []}
    known = {taps.parse(row["tap"]).tap for row in [*rows["rows"], *receipt["results"]["rows"]]}
    n_layers = receipt["model"]["shape"]["n_layers"]
    segment = None
    if "after" in location:
        segment = extent.between(location["tap"], location["after"], n_layers, OPTIONAL_TAPS - known)
    return extent.where({"layer": name.layer, "op": name.tap, "segment": segment})


def wrong_line(found: Mapping[str, Any]) -> str:
    """Return a wrong operation with its worst element, how far that is off, and how many are."""
    parts = [place(found)]
    if found["n_ops"] > 1:
        parts[0] += f", the last of {found['n_ops']} operations checked as one"
    if found.get("segment") is not None:
        parts[0] += f"; record {extent.narrower(found['segment'])} to narrow it down"
    worst = found["worst"]
    if worst is not None:
        axes = (name for name in taps.axis_names(found["tap"]) if name != "token")
        at = ", ".join(f"{name} {value}" for name, value in zip(axes, worst["index"], strict=False))
        times = "which has to be exact"
        if found["ratio"] is not None:
            times = f"{found['ratio']:.3g} times the bound"
        values = f"recorded {worst['recorded']:.9g}, expected {worst['expected']:.9g}"
        parts.append(f"position {worst['token']}, {at}: {values}, {times}")
    if found["n_beyond"]:
        unit = "tokens" if found["n_ops"] > 1 else f"of {found['n_elements']} values"
        parts.append(f"{found['n_beyond']} {unit} exceed it")
    if found["flips"]:
        parts.append(f"{found['flips']} int8 flips explained")
    if found["status"] == "invalid":
        parts.append(found["note"] or "invalid")
    elif found["n_ops"] == 1 and found["note"] and not found["flips"]:
        parts.append(found["note"])  # an overflow inside the operation
    return "; ".join(parts)


def cause(found: Mapping[str, Any]) -> str:
    """Return a diagnosis in a line: the name, what it means, how well it fits and how well the next does."""
    if found["name"] == UNDETERMINED:
        return f"{UNDETERMINED}: {found['explanation']}{_further(found)}"
    fit = f"fits to {found['ratio']:.2g}, the specification to {found['specification_ratio']:.2g}"
    if found["runner_up"] is not None:
        fit += f", next best ({found['runner_up']}) to {found['runner_up_ratio']:.2g}"
    family = "" if found["family"] is None else f" ({found['family']})"
    return f"{found['name']}{family}: {found['explanation'].rstrip('.')}; {fit}{_further(found)}"


def _further(found: Mapping[str, Any]) -> str:
    """Return where values that are not finite enter, and why; empty: nowhere else, or it is not known."""
    other = found.get("further")
    if other is None:
        return ""
    name = taps.parse(other["tap"])
    where = place({"layer": name.layer, "op": name.tap, **other})
    return f". Also wrong: {where}: {other['name']}: {other['explanation']}"


def segmented(receipt: Receipt) -> bool:
    """Return whether any operation of either engine was judged inside a segment only."""
    audits = receipt["audit"] or {}
    return any(summary.depth(audits[side]).n_segments for side in SIDES if audits.get(side))


def before(audit: Mapping[str, Any]) -> str:
    """Return what is known of the operations before the first wrong one."""
    found = audit["first_guilty"]
    at = found["pass_index"], taps.execution_index(found["tap"])
    rows = [summary.row_from_json(row) for row in audit["rows"]]
    # a row is about all passes: of later passes' operations nothing is claimed
    earlier = [row for row in rows if found["pass_index"] or taps.execution_index(row.tap) < at[1]]
    if any(row.n_unchecked for row in earlier):
        return "not everything before it was judged"
    if any(row.segments for row in earlier):
        return "what precedes it was judged in segments, not operation by operation"
    return "everything before it is correct"
