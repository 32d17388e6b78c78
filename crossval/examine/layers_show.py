"""Receipts of kind ``layers`` and ``diff`` for people: tables of taps, audits, views, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.audit import show as audit_show
from crossval.causal import show as causal_show
from crossval.compare import rows as compare
from crossval.compare.rows import LayersResult, TapRow
from crossval.console import at_most, new_table, percent, show_line
from crossval.examine import layers_receipt, locations
from crossval.examine.advice import advice_of, show_conclusion
from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.repeat import floors_show
from crossval.repeat.cells import STYLE, cell, number, times_floor
from crossval.repeat.floors import FloorTable
from crossval.repeat.floors_receipt import table_of

MAX_PASS_COLUMNS = 6


def show_layers(out: Console, receipt: Receipt) -> None:
    """Print the tables, the audits, the views, the verdict and the places where the engines first differ."""
    floors = table_of(receipt)
    which = "floor" if floors is None else "measured floor"
    legend = f"'=': all bits are equal, else the distance in ulp, or NMSE (relative error over its {which})"
    _show_run(out, receipt, f"Tap by tap; {legend}.", floors)
    floors_show.show_floors(out, receipt)
    causal_show.show_causal(out, receipt)
    if layers_receipt.DEFAULT_RUN in receipt:
        _show_run(
            out, layers_receipt.default_run_alone(receipt), "The default run: the same, with flash attention."
        )
    receipt = layers_receipt.decisive(receipt)
    rate = receipt["parity"]["exact_match_rate"]
    counts = ""
    if rate is not None:
        counts = ", all bits equal" if rate == 1.0 else f", {percent(rate)} of the values bit-equal"
    show_conclusion(
        out, receipt, counts, advice_of(receipt), _where, lambda one: f"pass {one['pass_index']} {one['tap']}"
    )


def _show_run(out: Console, receipt: Receipt, title: str, floors: FloorTable | None = None) -> None:
    """Print the tables and the audits of one run."""
    result = layers_receipt.from_json(receipt).result
    show_line(out, f"\n{title}")
    detailed: set[int | None] = set()
    out.print(layers_table(result, floors, at_most(out, MAX_PASS_COLUMNS)))
    for index, layer in _detailed(result, everything=bool(at_most(out, 0))):
        rows = [row for row in result.rows if row.pass_index == index and taps.parse(row.tap).layer == layer]
        if len(rows) > 1:
            detailed.add(layer)
            show_line(out, f"\nOperations of layer {layer} in pass {index} ({rows[0].pass_kind}).")
            out.print(ops_table(rows, floors))
    audit_show.show_audits(out, receipt)
    locations.show_guilty_layers(out, receipt, detailed)


def _where(receipt: Receipt, place: Mapping[str, Any]) -> str:
    row = "" if place["row"] is None else f", worst at position {place['row']}"
    where = f"{audit_show.seen_at(receipt, place)} (pass {place['pass_index']}, {place['pass_kind']}{row})"
    return where + (f": {place['note']}" if place["note"] else "")


def layers_table(
    result: LayersResult, floors: FloorTable | None = None, most_columns: int = MAX_PASS_COLUMNS
) -> Table:
    """Return one line per embedding, layer and head tap, one column per pass; many decoded tokens share one.

    ``floors``: measured ones, to use in the place of the tolerance table's. ``most_columns``: of passes.
    """
    found = {(row.pass_index, row.tap): row for row in result.rows}
    skipped = {(skip.pass_index, skip.tap) for skip in result.coverage.skipped}
    n_passes = max([len(result.plan), *(key[0] + 1 for key in skipped)], default=0)
    groups = _columns(result, n_passes, most_columns)
    table = new_table()
    table.add_column("tap", no_wrap=True)
    for title, _ in groups:
        table.add_column(title, no_wrap=True)
    known = {tap for _, tap in (*found, *skipped)}
    for tap in taps.outline_taps(result.n_layers):
        if tap not in known and taps.is_optional(tap):
            continue
        cells = [cell([(index, tap) for index in indexes], found, skipped, floors) for _, indexes in groups]
        table.add_row(_tap_label(tap), *cells)
    return table


def _columns(result: LayersResult, n_passes: int, most: int) -> list[tuple[str, list[int]]]:
    titles = {}
    for index, plan in enumerate(result.plan):
        titles[index] = f"{plan.kind} {len(plan.token_ids)}" if plan.kind == "prefill" else f"decode @{plan.start}"
    if n_passes <= most:
        return [(titles.get(index, f"pass {index}"), [index]) for index in range(n_passes)]
    single = [index for index, plan in enumerate(result.plan) if plan.kind == "prefill"][:most]
    rest = [index for index in range(n_passes) if index not in single]
    return [(titles[index], [index]) for index in single] + [(f"{len(rest)} more, worst", rest)]


def _tap_label(tap: str) -> str:
    parsed = taps.parse(tap)
    return parsed.tap if parsed.layer is None else f"layer {parsed.layer}"


def _detailed(result: LayersResult, *, everything: bool) -> list[tuple[int, int]]:
    """Return (pass, layer) of the tables to show: where it first diverges, else where bits first differ.

    ``everything``: all others as well.
    """
    place = result.first_divergence or result.first_inexact
    first = [(place.pass_index, place.layer)] if place is not None and place.layer is not None else []
    if not everything:
        return first
    known = dict.fromkeys((row.pass_index, taps.parse(row.tap).layer) for row in result.rows)
    return [
        *first,
        *((index, layer) for index, layer in known if layer is not None and (index, layer) not in first),
    ]


def ops_table(rows: Sequence[TapRow], floors: FloorTable | None = None) -> Table:
    """Return every metric of the operations of one layer, in execution order."""
    table = new_table()
    names = ("op", "state", "bits equal", "max ulp", "cosine", "NMSE", "floors", "worst token", "max abs", "norm")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        status = compare.row_status(row)
        state = "=" if status == "equal" else status
        table.add_row(
            taps.parse(row.tap).tap,
            Text(state, STYLE[status]),
            percent(row.exact_match_rate),
            _count(row.max_ulp),
            number(row.cosine, ".9f"),
            number(row.nmse, ".2e"),
            times_floor(row, floors).strip("()") or "-",
            number(row.worst_token_nmse, ".1e") + ("" if row.worst_token is None else f" @{row.worst_token}"),
            number(row.max_abs, ".2e"),
            number(row.norm_ratio, ".6f"),
        )
    return table


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return str(value) if value < 1_000_000 else f"{value:.1e}"
