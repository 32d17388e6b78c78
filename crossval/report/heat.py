"""Heat maps: cells of a state or a value, one row and one column each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossval.report.states import STATES, colour

_STEP = 20
"""Pixels of a cell."""


def heat_map(
    cells: Sequence[dict[str, Any]], columns: Sequence[str], rows: Sequence[str], title: str | None = None
) -> dict[str, Any]:
    """Return the specification of a heat map.

    ``cells`` have ``column``, ``row``, ``state`` and, to be shown when pointed at, ``says``. ``title``: what the
    columns are, where their names do not say it.
    """
    signs = {
        "transform": [{"filter": "datum.sign"}],
        "mark": {"type": "text", "color": "var(--sign)", "fontSize": 11, "aria": False},
        "encoding": {"text": {"field": "sign", "type": "nominal"}},
    }
    data = [{**cell, "sign": STATES[cell["state"]][1]} for cell in cells]
    return _map(data, columns, rows, title, colour([cell["state"] for cell in cells]), signs)


def value_map(
    cells: Sequence[dict[str, Any]], columns: Sequence[str], rows: Sequence[str], *, x: str, value: str
) -> dict[str, Any]:
    """Return the specification of a heat map of positive numbers, on a logarithmic scale.

    ``cells`` have ``column``, ``row``, ``value`` and ``says``; ``x`` and ``value`` name columns and values.
    """
    scale = {"type": "log", "scheme": "plasma", "nice": False}
    legend = {"title": value, "type": "symbol", "symbolType": "square", "format": ".0e", "tickCount": 4}
    shade = {"field": "value", "type": "quantitative", "scale": scale, "legend": legend}
    return _map(cells, columns, rows, x, shade)


def _map(
    data: Sequence[dict[str, Any]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str | None,
    shade: dict[str, Any],
    *above: dict[str, Any],
) -> dict[str, Any]:
    place = {
        "x": {"field": "column", "type": "nominal", "sort": list(columns), "title": title,
              "scale": {"domain": list(columns)}, "axis": {"labelAngle": -90 if _long(columns) else 0}},
        "y": {"field": "row", "type": "nominal", "sort": list(rows), "title": None,
              "scale": {"domain": list(rows)}},
    }  # fmt: skip
    cell = {
        "mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 1},
        "encoding": {"color": shade, "description": {"field": "says", "type": "nominal"}},
    }
    return {
        "data": {"values": list(data)},
        "width": {"step": _STEP},
        "height": {"step": _STEP},
        "encoding": place,
        "layer": [cell, *above],
    }


def _long(names: Sequence[str]) -> bool:
    return any(len(name) > 2 for name in names)
