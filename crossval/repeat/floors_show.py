"""Distances for people: how far the reference is from itself, and the tolerance that would be enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from crossval.compare.receipt import row_from_json
from crossval.compare.rows import TapRow
from crossval.console import show_line
from crossval.receipts.file import Receipt
from crossval.repeat.floors import FloorTable
from crossval.repeat.margins import smallest_tolerance
from crossval.terms import LOGITS


def show_floors(out: Console, receipt: Receipt) -> None:
    """Print the smallest tolerance that would pass, and the measured floors if there are any."""
    for label, text in lines(receipt):
        show_line(out, f"{label:10} {text}")


def lines(receipt: Receipt) -> Iterator[tuple[str, str]]:
    """Yield the same as (label, sentence)."""
    rows = [row_from_json(row) for row in receipt["results"]["rows"]]
    if rows:
        yield "tolerance", tolerance_line(rows)
    if "floors" in receipt:
        yield from (("floors", text) for text in summary_lines(receipt["floors"]))


def tolerance_line(rows: Sequence[TapRow]) -> str:
    """Return the smallest factor on the bounds in force that would pass every row, and the row that decides it."""
    smallest = smallest_tolerance(rows)
    where = f"pass {smallest.pass_index} {smallest.tap}"
    if smallest.factor is None:
        return f"{smallest.note} ({where})"
    if smallest.factor == 0.0:
        exact = smallest.by_class.get("exact", 0.0)
        return "none is needed: no value differs" + ("" if exact == 0.0 else " but for the embedding")
    if smallest.factor > 1.0:
        return f"{smallest.factor:.3g} times the bounds in force would be needed to pass ({where})"
    return f"{smallest.factor:.3g} of the bounds in force would be enough ({where})"


def summary_lines(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield in plain words how far the reference is from itself, and how far the rows are in multiples of that."""
    table = FloorTable.from_json(section["table"])
    largest = max(table.floors, key=lambda floor: floor.rel_l2, default=None)
    logits = table.of(LOGITS)
    if largest is not None:
        ways = ", ".join(dict.fromkeys(floor.variation for floor in table.floors))
        of_logits = "" if logits is None else f"; logits {logits.rel_l2:.2g}"
        yield (
            f"{table.engine} against itself on {table.n_tokens[0]} tokens ({ways}): relative error up to "
            f"{largest.rel_l2:.2g} ({largest.tap}){of_logits}"
        )
    if table.unmeasured:
        tap, variation, why = table.unmeasured[0]
        yield f"not measured: {len(table.unmeasured)}, first {tap}, {variation}: {why}"
    rows = section["multiples"]
    if not rows:
        yield "no row differs, so none is a multiple of its floor"
        return
    known = [row for row in rows if row["times"] is not None]
    if known:
        worst = max(known, key=lambda row: row["times"])
        where = f"(pass {worst['pass_index']} {worst['tap']})"
        yield f"{len(rows)} rows differ, by up to {worst['times']:.3g} times their floor {where}"
    others = [row for row in rows if row["times"] is None]
    if others:
        where = f"pass {others[0]['pass_index']} {others[0]['tap']}"
        yield f"{len(others)} rows have no multiple, first {where}: {others[0]['text']}"
