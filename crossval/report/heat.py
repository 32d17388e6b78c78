"""Heat maps: cells of a state, one row and one column each."""

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
    data = [{**cell, "sign": STATES[cell["state"]][1]} for cell in cells]
    place = {
        "x": {"field": "column", "type": "nominal", "sort": list(columns), "title": title,
              "scale": {"domain": list(columns)}, "axis": {"labelAngle": -90 if _long(columns) else 0}},
        "y": {"field": "row", "type": "nominal", "sort": list(rows), "title": None,
              "scale": {"domain": list(rows)}},
    }  # fmt: skip
    return {
        "data": {"values": data},
        "width": {"step": _STEP},
        "height": {"step": _STEP},
        "encoding": place,
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 1},
                "encoding": {
                    "color": colour([cell["state"] for cell in cells]),
                    "description": {"field": "says", "type": "nominal"},
                },
            },
            {
                "transform": [{"filter": "datum.sign"}],
                "mark": {"type": "text", "color": "var(--sign)", "fontSize": 11, "aria": False},
                "encoding": {"text": {"field": "sign", "type": "nominal"}},
            },
        ],
    }


def _long(names: Sequence[str]) -> bool:
    return any(len(name) > 2 for name in names)
