"""The figure of bench receipts: how much faster the candidate is, with the range over the rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossval.receipts.file import Receipt
from crossval.report.figure import Figure


def bench_figures(receipt: Receipt) -> Iterator[Figure]:
    """Yield the ratios of all measures that have one, beside every reference."""
    results = receipt["results"]
    pairs = [results, *results.get("references", ())] if "measures" in results else []
    for number, pair in enumerate(pairs, 1):
        values = [
            {"measure": name, **found["ratio"]}
            for name, found in pair["measures"].items()
            if found["ratio"] is not None
        ]
        if values:
            which = f" beside reference {number}" if len(pairs) > 1 else ""
            yield Figure(
                f"Speed{which}: median and range of the ratios; right of 1 the candidate wins.", _ratios(values)
            )


def _ratios(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    place = {"y": {"field": "measure", "type": "nominal", "title": None, "sort": None}}
    return {
        "data": {"values": values},
        "width": 360,
        "height": {"step": 28},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 4, "color": "var(--exact)", "opacity": 0.5},
                "encoding": {
                    **place,
                    "x": {"field": "min", "type": "quantitative", "title": "ratio", "scale": {"zero": False}},
                    "x2": {"field": "max"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "color": "var(--fine)"},
                "encoding": {**place, "x": {"field": "median", "type": "quantitative"}},
            },
            {"mark": {"type": "rule", "strokeDash": [3, 3], "aria": False}, "encoding": {"x": {"datum": 1}}},
        ],
    }
