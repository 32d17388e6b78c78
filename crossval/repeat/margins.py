"""How large a difference is: in multiples of a measured floor, and beside the tolerance it was held to.

A report says "3 times the floor", not "exceeds 1e-5", and names the smallest tolerance that would pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crossval.compare.rows import TapRow, row_status
from crossval.errors import BadInputError
from crossval.model.tolerance import tap_class
from crossval.repeat.floors import Floor, FloorTable


@dataclass(frozen=True)
class Multiple:
    """A difference between two engines beside what one engine differs from itself."""

    tap: str
    rel_l2: float | None
    """Of the row; None when it is undefined (NaN, a shape that does not fit)."""
    floor: Floor | None
    """None: no floor of this tap was measured."""
    times: float | None
    """``rel_l2`` over the floor's; 0.0 for equal bits; None where that is undefined (``text`` says why)."""

    @property
    def text(self) -> str:
        """The same in words."""
        if self.rel_l2 is None:
            return "not comparable"
        if self.floor is None:
            return "no floor was measured"
        if self.times is None:
            return "differs, where the engine repeats itself bit for bit"
        return "equal" if self.rel_l2 == 0.0 else f"{self.times:.3g} times the floor"


def multiples(row: TapRow, floors: FloorTable) -> Multiple:
    """Express a row's relative L2 difference in multiples of the measured floor of its tap."""
    rel_l2 = None if row.nmse is None or row_status(row) == "invalid" else math.sqrt(row.nmse)
    floor = floors.of(row.tap)
    times: float | None = None
    if rel_l2 is not None and floor is not None:
        if rel_l2 == 0.0:
            times = 0.0
        elif floor.rel_l2 > 0.0:
            times = rel_l2 / floor.rel_l2
    return Multiple(row.tap, rel_l2, floor, times)


def usage(row: TapRow) -> float | None:
    """Return the factor on the row's relative L2 bound at which it would just pass; at most 1 passes now.

    0.0 for equal bits, ``inf`` when no factor helps, None when the row is invalid. The bounds of cosine and norm
    scale with the relative L2 bound, as ``crossval.model.tolerance`` derives them.
    """
    status = row_status(row)
    if status == "invalid":
        return None
    if status == "equal" or row.max_abs == 0.0:
        return 0.0
    bound = math.sqrt(row.bound.get("nmse", 0.0))
    token = math.sqrt(row.bound.get("worst_token_nmse", 0.0))
    worst = 0.0
    for metric, threshold in row.bound.items():
        value = getattr(row, metric, None)
        if value is None:
            return math.inf
        if metric == "nmse":
            worst = max(worst, _over(math.sqrt(value), bound))
        elif metric == "worst_token_nmse":
            worst = max(worst, _over(math.sqrt(value), token))
        elif metric in ("cosine", "worst_token_cosine"):
            if value < 0.0:
                return math.inf
            sine = math.sqrt(max(0.0, (1.0 - value) * (1.0 + value)))
            worst = max(worst, _over(sine, bound if metric == "cosine" else token))
        elif metric == "norm_ratio":
            worst = max(worst, _over(abs(value - 1.0), threshold))
        else:
            return math.inf
    return worst if row.bound else math.inf


def _over(value: float, allowed: float) -> float:
    if value == 0.0:
        return 0.0
    return value / allowed if allowed > 0.0 else math.inf


@dataclass(frozen=True)
class SmallestTolerance:
    """The smallest tolerance under which every row would pass."""

    factor: float | None
    """On the bounds in force; at most 1 passes now. None: no tolerance would do, ``note`` says why."""
    tap: str | None
    """The tap that decides it, and its pass."""
    pass_index: int | None
    by_class: dict[str, float]
    """Largest factor within every tolerance class."""
    note: str | None = None


def smallest_tolerance(rows: Sequence[TapRow]) -> SmallestTolerance:
    """Return the smallest factor on the tolerances of ``rows`` (of one result, one policy) that passes them all.

    The embedding is held to exactness, which no factor may loosen: rows of it that fail leave ``factor`` None.

    Raises:
        BadInputError: no rows; nothing compared passes under no tolerance.
    """
    if not rows:
        raise BadInputError("no rows: nothing was compared, so no tolerance would pass")
    by_class: dict[str, float] = {}
    worst, decides = -1.0, rows[0]
    for row in rows:
        used, kind = usage(row), tap_class(row.tap)
        if used is None or math.isinf(used) or (kind == "exact" and used > 1.0):
            why = f"no tolerance would do: {_why_hopeless(row)}"
            return SmallestTolerance(None, row.tap, row.pass_index, by_class, why)
        by_class[kind] = max(by_class.get(kind, 0.0), used)
        if kind != "exact" and used > worst:
            worst, decides = used, row
    if worst < 0.0:  # the embedding alone
        return SmallestTolerance(0.0, None, None, by_class)
    return SmallestTolerance(worst, decides.tap, decides.pass_index, by_class)


def _why_hopeless(row: TapRow) -> str:
    if row_status(row) == "invalid":
        return row.note or "a metric is undefined"
    if tap_class(row.tap) == "exact":
        return "it has to be exact"
    cosines = [value for value in (row.cosine, row.worst_token_cosine) if value is not None]
    return "a cosine is negative" if min(cosines, default=0.0) < 0.0 else "a metric is undefined"
