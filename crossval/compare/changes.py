"""What changed between two snapshots of one engine: a list per operation, from two traces over the same tokens.

Nothing is judged here: a change may be a fix. Which snapshot is right is what ``crossval diff`` audits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from crossval.compare.rows import TapRow, choose_policy, compare_tap, row_status
from crossval.model import taps
from crossval.model.tolerance import tolerance_for
from crossval.traces.read import Trace


@dataclass
class OpChange:
    """One operation over all layers and passes that both traces hold."""

    op: str
    equal: int = 0
    """Taps of which all bits are equal."""
    within_floor: int = 0
    """Taps no further apart than two runs of one correct engine are (NMSE; ``crossval.model.tolerance``)."""
    within: int = 0
    """Further apart, but within the bounds that two engines are held to."""
    beyond: int = 0
    """Beyond these bounds, or not comparable (NaN)."""
    largest: TapRow | None = None
    """The tap with the largest error, of those that changed; one that cannot be compared counts as larger."""

    @property
    def compared(self) -> int:
        """How many taps were compared."""
        return self.equal + self.within_floor + self.within + self.beyond


@dataclass(frozen=True)
class Changes:
    """What changed, operation by operation in the order of execution."""

    ops: tuple[OpChange, ...]
    first: TapRow | None
    """The first tap, in the order of execution, whose bits differ; everything before it is bit-identical."""
    n_passes: int
    """Passes compared: those that both traces were fed alike, from the first."""
    held: tuple[int, int]
    """Passes in either trace."""
    only: tuple[tuple[str, ...], tuple[str, ...]] = field(default=((), ()))
    """Operations that only the first trace holds, and only the second."""


def changes(before: Trace, after: Trace) -> Changes:
    """Compare every tap that both traces hold, pass by pass while both were fed the same tokens.

    Raises:
        BadInputError: a pass file that is missing, damaged or not the recorded one.
    """
    n_layers = min(before.info.model.n_layers, after.info.model.n_layers)
    found: dict[str, OpChange] = {}
    first: TapRow | None = None
    n_passes = 0
    for a, b in zip(before.info.plan, after.info.plan, strict=False):
        if a != b:
            break
        for row in _rows(before, after, n_passes, n_layers):
            if _count(found.setdefault(taps.parse(row.tap).tap, OpChange(taps.parse(row.tap).tap)), row):
                first = first or row
        n_passes += 1
    ordered = sorted(found.values(), key=lambda one: _place(one.op))
    ours, theirs = (_ops(trace, n_passes) for trace in (before, after))
    only = (tuple(sorted(ours - theirs, key=_place)), tuple(sorted(theirs - ours, key=_place)))
    return Changes(tuple(ordered), first, n_passes, (len(before.info.plan), len(after.info.plan)), only)


def _rows(before: Trace, after: Trace, index: int, n_layers: int) -> Iterator[TapRow]:
    """Yield one row per tap of a pass that both hold, in the order of execution."""
    policy = choose_policy(before.info.engine, after.info.engine)
    ours, theirs = before.taps(index), after.taps(index)
    for name in sorted(set(ours) & set(theirs), key=lambda one: taps.execution_index(one, n_layers)):
        tolerance = tolerance_for(name, n_layers, policy)
        row = compare_tap(name, index, before.info.plan[index], ours[name], theirs[name], tolerance)
        if isinstance(row, TapRow):
            yield row


def _count(change: OpChange, row: TapRow) -> bool:
    """Count a row; return whether its bits changed."""
    if row.bitwise_equal:
        change.equal += 1
        return False
    if row_status(row) != "within":
        change.beyond += 1
    elif row.nmse is not None and row.floor is not None and row.nmse <= row.floor:
        change.within_floor += 1
    else:
        change.within += 1
    if change.largest is None or _error(row) > _error(change.largest):
        change.largest = row
    return True


def _error(row: TapRow) -> float:
    return float("inf") if row.nmse is None else row.nmse


def _ops(trace: Trace, n_passes: int) -> set[str]:
    return {taps.parse(name).tap for index in range(n_passes) for name in trace.info.passes[index].taps}


def _place(op: str) -> int:
    name = op if op in taps.outline_taps(1) else f"blk.0.{op}"
    return taps.execution_index(name, 1)
