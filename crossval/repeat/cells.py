"""Cells of the tables that show how far two engines are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from crossval.compare import rows as compare
from crossval.compare.rows import TapRow
from crossval.repeat.floors import FloorTable
from crossval.repeat.margins import multiples

STYLE = {"equal": "green", "within": "yellow", "diverged": "bold red", "invalid": "bold red", "skipped": "red"}


def cell(
    keys: Sequence[tuple[int, str]],
    found: Mapping[tuple[int, str], TapRow],
    skipped: set[tuple[int, str]],
    floors: FloorTable | None = None,
) -> Text:
    """Return the worst of several rows: equal, its distance in ulp or NMSE, or what is missing."""
    rows = [found[key] for key in keys if key in found]
    if any(key in skipped or key not in found for key in keys):
        return Text("skipped", STYLE["skipped"])
    worst = max(rows, key=_badness)
    status = compare.row_status(worst)
    if status == "equal":
        return Text("=", STYLE[status])
    if status == "invalid" or worst.nmse is None:
        return Text("invalid", STYLE["invalid"])
    ulp = [row.max_ulp for row in rows if row.max_ulp is not None]
    if len(ulp) == len(rows) and max(ulp) <= MOST_ULP:
        return Text(f"{max(ulp)} ulp", STYLE[status])
    return Text(f"{worst.nmse:.1e} {times_floor(worst, floors)}".rstrip(), STYLE[status])


MOST_ULP = 9999
"""Farther apart than this, the number of float32 values between two numbers says nothing."""


_RANK = {"equal": 0, "within": 1, "diverged": 2, "invalid": 3}


def _badness(row: TapRow) -> tuple[int, float]:
    return _RANK[compare.row_status(row)], row.nmse or 0.0


def times_floor(row: TapRow, floors: FloorTable | None = None) -> str:
    """Return how many floors a row is apart, in relative error, as ``(2.5x)``; empty: no floor."""
    if floors is not None:
        times = multiples(row, floors).times
        return "" if times is None else f"({times:.2g}x)"
    if row.nmse is None or not row.floor:
        return ""
    # Floors are NMSE, a squared quantity; people think in relative error.
    return f"({(row.nmse / row.floor) ** 0.5:.2g}x)"


def number(value: float | None, form: str) -> str:
    """Return a number in this format, or a dash."""
    return "-" if value is None else format(value, form)
