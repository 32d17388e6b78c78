"""Figures of the receipts that compare and audit tensors: ``layers``, ``diff`` and, of its audit, ``greedy``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossval.audit import summary
from crossval.compare.rows import LayersResult, TapRow, row_status
from crossval.examine import layers_receipt
from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.report.figure import Figure
from crossval.report.heat import heat_map, value_map
from crossval.report.states import AUDITED, COMPARED, colour
from crossval.terms import SIDES

MODEL_ROW = "model"
"""The row of operations that belong to no layer."""
FLOOR = 1e-4
"""Smallest ratio on the axis: what is below, and 0, is drawn there."""
CEILING = 1e9
"""Largest ratio on the axis; infinite ones (a bound of 0) are drawn there."""


def compared_figures(receipt: Receipt) -> Iterator[Figure]:
    """Yield what the direct comparison of two engines found: layers by passes, and by tokens where it differs."""
    result = layers_receipt.from_json(receipt).result
    if not result.rows:
        return
    names = {index: f"{plan.kind} {len(plan.token_ids)}" for index, plan in enumerate(result.plan)}
    names |= {index: f"@{plan.start}" for index, plan in enumerate(result.plan) if plan.kind == "decode"}
    outline = taps.outline_taps(result.n_layers)
    cells = [
        {
            "column": names.get(row.pass_index, str(row.pass_index)),
            "row": _label(row.tap),
            "state": COMPARED[row_status(row)],
            "says": f"{row.tap}, pass {row.pass_index}: NMSE {row.nmse}, {row.max_ulp} ulp",
        }
        for row in result.rows
        if row.tap in outline
    ]
    rows = [_label(tap) for tap in outline if any(cell["row"] == _label(tap) for cell in cells)]
    columns = [name for index, name in names.items() if any(cell["column"] == name for cell in cells)]
    yield Figure(
        "Direct comparison: the outputs of the layers, candidate against reference, in each pass.",
        heat_map(cells, columns, rows),
    )
    if any(row.worst_token is not None for row in result.rows):
        yield Figure(
            "Error (NMSE) of each token in the output of each layer, by its position in the sequence. A blank has "
            "no error; of passes of one token, and of receipts that do not keep all, the worst token is shown.",
            _tokens(result),
        )


def _tokens(result: LayersResult) -> dict[str, Any]:
    outline = set(taps.outline_taps(result.n_layers))
    cells: list[dict[str, Any]] = [
        {"column": str(position), "row": _label(row.tap), "value": CEILING if nmse is None else nmse,
         "says": f"{row.tap}, position {position}: NMSE {'undefined' if nmse is None else f'{nmse:.3g}'}"}
        for row in result.rows
        if row.tap in outline and row.worst_token is not None
        for position, nmse in _errors(row, result.plan[row.pass_index].start)
        if nmse != 0.0
    ]  # fmt: skip
    positions = [str(position) for position in range(len(result.token_ids))]
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    return value_map(cells, positions, rows, x="position", value="NMSE")


def _errors(row: TapRow, start: int) -> Iterator[tuple[int, float | None]]:
    """Yield position and NMSE of the tokens of a row that are known."""
    if row.token_nmse is None:
        assert row.worst_token is not None
        yield row.worst_token, row.worst_token_nmse
    else:
        yield from enumerate(row.token_nmse, start)


def audited_figures(receipt: Receipt) -> Iterator[Figure]:
    """Yield, of each audited engine, error against bound over the layers, and every operation of every layer."""
    audits = {side: (receipt["audit"] or {}).get(side) for side in SIDES}
    audited = {
        side: [summary.row_from_json(row) for row in audit["rows"]] for side, audit in audits.items() if audit
    }
    known = {taps.parse(row.tap).tap for rows in audited.values() for row in rows}
    for side, rows in audited.items():
        name = f"{side} {receipt[side]['name']}"
        yield Figure(
            f"Error of every operation of the {name} as a multiple of its bound, by layer. "
            "Above the line at 1 an operation is wrong.",
            _against_bounds(rows),
        )
        yield Figure(
            f"Every operation of the {name}, computed again in float64 from the engine's own inputs. What it "
            "did not record is blank: it was judged inside the next one.",
            _by_operation(rows, [tap for tap in taps.OPS if tap in known]),
        )


def _against_bounds(rows: Sequence[summary.AuditRow]) -> dict[str, Any]:
    points: list[dict[str, Any]] = [
        {
            "layer": _layer(row.tap),
            "ratio": _drawn(row),
            "state": _audited(row),
            "says": f"{row.tap}: {_ratio(row)} times its bound",
        }
        for row in rows
        if summary.status_of(row) != "unchecked"
    ]
    layers = list(dict.fromkeys(_layer(row.tap) for row in rows))
    highest = max([10.0, *(point["ratio"] for point in points)])
    return {
        "data": {"values": points},
        "width": {"step": max(20, 480 // len(layers))},
        "height": 220,
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 28, "opacity": 0.8},
                "encoding": {
                    "x": {"field": "layer", "type": "nominal", "sort": layers, "title": "layer",
                          "axis": {"labelAngle": 0}},
                    "y": {"field": "ratio", "type": "quantitative", "title": "error / bound",
                          "scale": {"type": "log", "domain": [FLOOR, highest]},
                          "axis": {"format": ".0e", "tickCount": 6}},
                    "color": colour([point["state"] for point in points]),
                    "description": {"field": "says", "type": "nominal"},
                },
            },
            {"mark": {"type": "rule", "aria": False}, "encoding": {"y": {"datum": 1}}},
        ],
    }  # fmt: skip


def _by_operation(rows: Sequence[summary.AuditRow], columns: Sequence[str]) -> dict[str, Any]:
    cells = [
        {
            "column": taps.parse(row.tap).tap,
            "row": _layer(row.tap),
            "state": _audited(row),
            "says": f"{row.tap}: {_ratio(row)} times its bound, {row.n_beyond} of {row.n_elements} beyond it",
        }
        for row in rows
    ]
    return heat_map(cells, columns, list(dict.fromkeys(cell["row"] for cell in cells)))


def _audited(row: summary.AuditRow) -> str:
    status = summary.status_of(row)
    return "exact" if status == "ok" and row.ratio == 0 else AUDITED[status]


def _ratio(row: summary.AuditRow) -> str:
    return "infinitely many" if row.ratio is None else f"{row.ratio:.3g}"


def _drawn(row: summary.AuditRow) -> float:
    return CEILING if row.ratio is None else min(max(row.ratio, FLOOR), CEILING)


def _layer(tap: str) -> str:
    layer = taps.parse(tap).layer
    return MODEL_ROW if layer is None else str(layer)


def _label(tap: str) -> str:
    parsed = taps.parse(tap)
    return parsed.tap if parsed.layer is None else f"layer {parsed.layer}"


def worst_values(receipt: Receipt) -> list[Mapping[str, Any]]:
    """Return the operations outside their bounds, the first ones first: side, tap, worst element."""
    found: list[Mapping[str, Any]] = []
    for side in SIDES:
        for row in ((receipt["audit"] or {}).get(side) or {}).get("rows", ()):
            if summary.status_of(summary.row_from_json(row)) in ("guilty", "invalid"):
                found.append({"side": side, **row})
    return found
