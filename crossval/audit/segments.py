"""Segments: several operations between recorded tensors, judged by their rounding.

The specification computes the segment from what was recorded before it, with the bound of ``bounds.approx``. A
token outside its bound is *explained* when the engine may have rounded some int8 activations of the segment to the
other side of a tie: every choice of activations near a tie is tried, nearest first, until the token's values come
out within their bound. What no choice explains is wrong where all of them could be tried; where there are too
many, or the token attends to one that is open itself, the check is ``within``, with how far the token is off: such
a segment agrees, but an error smaller than that would not be seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic, Reading
from crossval.audit.bounds.approx import Approx, Flips, Ties, joined, round_to
from crossval.audit.flips import most_trials, search
from crossval.audit.state import Output, Part
from crossval.formats import BF16, F16, F32, Format
from crossval.model import taps
from crossval.model.kinds import Attend, BitLinear, FloatArray, Softmax, TernaryMatrix
from crossval.model.op import Op, WeightSource
from crossval.model.taps import state_source, token_axis
from crossval.model.tolerance import CLASSES, FLOOR_PER_SQRT_LAYER, SAFETY, WORST_TOKEN, PolicyName, tap_class

LARGEST_TOLERANCE = 0.9
"""Distance that flips never explain, whatever the format: a row of zeros is 1 away, an unrelated one about 1.4."""
RESOLVES = 2e-3
"""Largest bound of a token, relative L2, that counts as rounding level (docs/audit.md: bugs lie above it)."""
_POLICY: Mapping[Format, PolicyName] = {F16: "f16", BF16: "bf16"}
Readings = dict[str, Reading]
"""Where the engine rounds to a 16-bit format, by the name of the operation; without those that leave no choice."""


@dataclass(frozen=True)
class Cells:
    """Rows of a KV cache that earlier passes left."""

    approx: Approx | None
    """None: this is the first pass."""
    n_open: float
    """Undecided ties among what they were computed from; infinite: not explained at all."""


@dataclass
class Segment:
    """The operations that lead to one recorded tensor of one pass."""

    output: Output
    ops: tuple[Op, ...]
    """In execution order; the last one is the output's."""
    inputs: Mapping[str, Part]
    """What they read and do not compute."""
    cells: Mapping[str, Cells]
    """KV state, by the name that operations read it under."""
    weights: WeightSource
    arithmetic: Arithmetic
    preferred: Readings
    """Those that fitted this engine's other segments: tried first."""
    readings: Readings = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    """Results for all rows as they are now explained."""
    ties: dict[str, Ties] = field(default_factory=dict)
    """By quantised tap."""
    failed_trials: int = 0
    """Choices tried in vain, in this engine's segments before this one included."""

    @property
    def flips(self) -> dict[tuple[str, int], frozenset[int]]:
        """What is known of flips: shared with the other segments of the pass."""
        return self.output.state.flips

    @property
    def every_row(self) -> tuple[int, ...]:
        """All rows of the pass."""
        return self.output.state.all_rows

    # --- computing --------------------------------------------------------------------------------------------

    @np.errstate(over="ignore", invalid="ignore")  # a bound that overflows shows nothing, and says so
    def evaluate(
        self, rows: Sequence[int], flips: Flips, readings: Readings, start: int = 0
    ) -> tuple[dict[str, Part], dict[str, Ties]]:
        """Compute the segment for some rows, all that earlier rows left in the cache being as in ``parts``.

        ``start``: the first operation to compute; what those before it gave is in ``parts``.

        Raises:
            ValueError: an input was not recorded for these rows.
        """
        made: dict[str, Part] = {}
        ties: dict[str, Ties] = {}
        for op in self.ops[start:]:
            have = self._rows(op, rows, made)
            arrays = [self._input(op, name, have, made) for name in op.inputs]
            if op.name in readings:
                arrays = [round_to(r, a) for a, r in zip(arrays, readings[op.name].rounded, strict=True)]
            weights = [self.weights[name] for name in op.weights]
            if weights and isinstance(weights[0], TernaryMatrix):
                arithmetic = self._inside(op)
                result, near = bounds.propagate_bitlinear(op, arrays[0], have, weights, arithmetic, flips)
                ties[op.inputs[0]] = near  # the same of every BitLinear that reads it
            else:
                arithmetic = self._inside(op).reading(readings.get(op.name))
                result = bounds.propagate(op, arrays, weights, arithmetic)
            made[op.output] = Part(result, have)
        return made, ties

    def _inside(self, op: Op) -> Arithmetic:
        """Return the arithmetic of an operation: what a kernel keeps to itself is rounded to no 16-bit format.

        That is a result that only the kernel itself reads, and the codes it makes of one.
        """
        kept = set(self.arithmetic.numerics.fused)
        quantised = {taps.parse(op.inputs[0]).tap} if isinstance(op.kind, BitLinear) else set()
        own = self.arithmetic.of(op)
        if not own.low or kept.isdisjoint({op.name} | quantised):
            return own
        return replace(own, numerics=replace(own.numerics, compute_dtype=None))

    def _rows(self, op: Op, rows: Sequence[int], made: Mapping[str, Part]) -> tuple[int, ...]:
        """Return the rows an operation can be computed for; of the recorded output, those that were recorded."""
        wanted = self.output.rows if op is self.output.op else self.every_row
        found = [row for row in rows if row in wanted]
        for name in op.inputs:
            part = made.get(name) or self.inputs.get(name) or self.parts.get(name)
            if part is not None:
                found = [row for row in found if row in part.rows]
        if not found:
            raise ValueError(f"{op.output}: no row of its inputs was recorded")
        return tuple(found)

    def _input(self, op: Op, name: str, rows: tuple[int, ...], made: Mapping[str, Part]) -> Approx:
        if name in self.cells:
            return self._cache(name, made)
        part = made.get(name) or self.inputs.get(name) or self.parts[name]
        if part.rows == rows:
            return part.approx
        where = {row: i for i, row in enumerate(part.rows)}
        return part.approx.rows([where[row] for row in rows], token_axis(name))

    def _cache(self, name: str, made: Mapping[str, Part]) -> Approx:
        """Return the KV state up to this pass's last row, with the rows computed now put in their places."""
        source = state_source(name)
        new = made.get(source)
        whole = self.parts.get(source) or self.inputs.get(source) or new
        assert whole is not None
        current = whole.approx
        if new is not None and new is not whole:
            current = whole.approx.with_rows([whole.rows.index(row) for row in new.rows], new.approx)
        earlier = self.cells[name].approx
        return current if earlier is None else joined(earlier, current)

    # --- judging ----------------------------------------------------------------------------------------------

    def ratio(self, made: Mapping[str, Part]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return ``|recorded - expected| / bound``, expected and bound of the recorded rows that were computed.

        Raises:
            ValueError: the recorded array has another shape.
        """
        output, part = self.output, made[self.output.op.output]
        target = taps.take_rows(output.op.output, output.array, output.rows, part.rows).astype(np.float64)
        expected, bound = part.approx.value, part.approx.total
        if target.shape != expected.shape:
            raise ValueError(f"expected shape {expected.shape}, recorded {target.shape}")
        bound = bound * bounds.SECOND_ORDER
        if not self.arithmetic.known:
            bound = bound + bounds.U * np.abs(target)  # it was rounded once more to be recorded
        bound = bound + self.arithmetic.of(output.op).storing(F32, output.form).stored(target)
        bound = np.nan_to_num(bound, nan=np.inf, posinf=np.inf)  # it overflowed: nothing is outside of it
        off = np.abs(target - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(off == 0, 0.0, off / bound)
        return self._masked(ratio, part.rows), expected, bound

    def _masked(self, array: FloatArray, rows: Sequence[int]) -> FloatArray:
        """Return an array shaped as the output, zero where nothing reads it."""
        positions = [self.output.state.plan.positions[row] for row in rows]
        visible = taps.visible(self.output.op.output, array.shape, positions)
        return array if visible is None else np.where(visible, array, 0.0)

    def worst_by_row(self, made: Mapping[str, Part]) -> dict[int, float]:
        """Return the largest ratio of each row that was computed."""
        ratio, _, _ = self.ratio(made)
        axes = tuple(i for i in range(ratio.ndim) if i != token_axis(self.output.op.output))
        return dict(zip(made[self.output.op.output].rows, map(float, ratio.max(axis=axes)), strict=True))

    def compute(self) -> None:
        """Compute all rows, as they are known to be flipped, without judging them."""
        self.readings = next(self._allowed())
        self.parts, self.ties = self.evaluate(self.every_row, self.flips, self.readings)

    def part_of(self, name: str, decided: Mapping[int, float] | None = None) -> Part:
        """Return a computed tensor; its ties are open but for rows where ``decided`` gives their number."""
        part, known = self.parts[name], decided or {}
        n_open = [known[row] if row in known else self.n_open(row) for row in part.rows]
        return replace(part, n_open=np.asarray(n_open, np.float64))

    def settle(self) -> Outcome:
        """Judge every recorded row; explain what can be explained by flips, and keep what that changes.

        A flip in a token that others attend to puts all of them outside their bounds, under the right reading too.
        So where the reading that most rows fit leaves rows beyond, and there are ties, the others are tried.
        """
        known = dict(self.flips)
        self._read()
        best, first = self._settle(), self.readings
        for readings in self._allowed():
            if not best.beyond or not any(len(one.rows) for one in self.ties.values()):
                break
            if readings == first:
                continue
            held = dict(self.flips), self.readings, self.parts, self.ties
            self._restore(known)
            self.readings = readings
            self.parts, self.ties = self.evaluate(self.every_row, self.flips, readings)
            other = self._settle()
            if (len(other.beyond), len(other.excused)) < (len(best.beyond), len(best.excused)):
                best = other
            else:
                flips, self.readings, self.parts, self.ties = held
                self._restore(flips)
        return best

    def _restore(self, flips: Mapping[tuple[str, int], frozenset[int]]) -> None:
        self.flips.clear()
        self.flips.update(flips)

    def _settle(self) -> Outcome:
        """Judge every recorded row under the reading that is chosen."""
        every = self.every_row
        by_row = self.worst_by_row(self.parts)
        beyond: set[int] = set()
        excused: dict[int, float] = {}
        tainted = False
        for row in self.output.rows:
            if _fits(by_row[row]):
                continue
            found, complete = (None, False) if tainted else self._explain(row)
            if found is not None:
                self.flips.update(found)
                self.parts, self.ties = self.evaluate(every, self.flips, self.readings)
                by_row = self.worst_by_row(self.parts)
            elif complete or self.distance(row) > self.tolerance:
                beyond.add(row)
            else:
                excused[row] = self.distance(row)
            tainted = tainted or (found is None and self._attends)
        if not beyond:
            excused.update(self._unresolved(excused))
        return Outcome(self, frozenset(beyond), excused)

    def _unresolved(self, excused: Mapping[int, float]) -> dict[int, float]:
        """Return the rows whose bound is too wide to show anything, and how wide it is."""
        wide = {row: width for row, width in self._widths(self.parts).items() if width > self.resolves}
        return {row: max(width, excused.get(row, 0.0)) for row, width in wide.items()}

    @property
    def resolves(self) -> float:
        """Largest bound of a token that shows something: rounding level, beside the recorded value's own."""
        return RESOLVES + self.arithmetic.format.unit_roundoff

    def _widths(self, parts: Mapping[str, Part]) -> dict[int, float]:
        """Return the bound of each row that was computed, in relative L2; at most 1."""
        part = parts[self.output.op.output]
        _, expected, bound = self.ratio(parts)
        axes = tuple(i for i in range(expected.ndim) if i != token_axis(self.output.op.output))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            size = np.sqrt(np.sum(self._masked(expected, part.rows) ** 2, axis=axes))
            width = np.sqrt(np.sum(self._masked(bound, part.rows) ** 2, axis=axes)) / size
        return dict(zip(part.rows, map(float, np.nan_to_num(width, nan=1.0, posinf=1.0).clip(0, 1)), strict=True))

    @property
    def _attends(self) -> bool:
        """Whether later rows of the pass read what this segment computes of earlier ones."""
        made = {op.output for op in self.ops}
        return any(state_source(name) in made for name in self.cells)

    def _read(self) -> None:
        """Choose the reading that most rows fit, and of those that all fit one whose bound shows something."""
        best: tuple[int, float] | None = None
        for readings in self._allowed():
            parts, ties = self.evaluate(self.every_row, self.flips, readings)
            worst = list(self.worst_by_row(parts).values())
            off = sum(not _fits(ratio) for ratio in worst)
            width = max(self._widths(parts).values())
            rank = (off, float(np.median(np.nan_to_num(worst, nan=math.inf))) if off else width)
            if best is None or rank < best:
                best, self.readings, self.parts, self.ties = rank, readings, parts, ties
            if off == 0 and width <= self.resolves:
                return

    def _allowed(self) -> Iterator[Readings]:
        """Yield the allowed readings of the segment's operations, all operations of a name being read alike."""
        n_tokens, n_rows = len(self.every_row), len(self.output.rows)
        allowed = {op.name: bounds.readings(op, self.arithmetic, n_tokens, n_rows) for op in self.ops}
        if not self.arithmetic.known and any(isinstance(op.kind, Softmax) for op in self.ops):
            for name in [op.name for op in self.ops if isinstance(op.kind, Attend)]:
                allowed[name] += (bounds.FLASH,)
        allowed = {name: found for name, found in allowed.items() if any(any(r.rounded) for r in found)}
        ranked = [_first(self.preferred.get(name), found) for name, found in allowed.items()]
        for combination in itertools.product(*ranked):
            yield dict(zip(allowed, combination, strict=True))

    # --- flips ------------------------------------------------------------------------------------------------

    def _explain(self, row: int) -> tuple[dict[tuple[str, int], frozenset[int]] | None, bool]:
        """Search the flips that make a row fit; None: none do. Also whether every choice was tried."""
        hidden = [r for r in range(row) if r not in self.output.rows]
        reads: dict[str, int] = {}  # quantised tap -> the first operation that reads it
        for i, op in enumerate(self.ops):
            if isinstance(op.kind, BitLinear):
                reads.setdefault(op.inputs[0], i)

        def attempt(first: int, tap: str, flips: Flips) -> tuple[bool, Mapping[str, Ties]]:
            rows = (row,) if first == row else tuple(range(first, row + 1))
            parts, ties = self.evaluate(rows, flips, self.readings, reads[tap])
            return _fits(self.worst_by_row(parts)[row]), ties

        found = search(
            attempt,
            self.ties,
            [row, *hidden] if self._attends else [row],
            reads,
            self.flips,
            most_trials(self.failed_trials, [self.weights[name] for op in self.ops for name in op.weights]),
        )
        self.failed_trials += found.n_failed
        return found.flips, found.flips is not None or (found.complete and self._undecided(row) == 0)

    def _undecided(self, row: int) -> float:
        """Return the ties that a row depends on, outside of this segment, that nothing has decided."""
        sources = {state_source(name) for name in self.cells}
        found = sum(cells.n_open for cells in self.cells.values())
        for name, part in self.inputs.items():
            found += part.open_up_to(row, alone=name not in sources)
        return found

    def distance(self, row: int) -> float:
        """Return the relative L2 distance of a recorded row from what is expected of it."""
        part, axis = self.parts[self.output.op.output], token_axis(self.output.op.output)
        target = np.take(self.output.array, [self.output.rows.index(row)], axis=axis).astype(np.float64)
        expected = np.take(part.approx.value, [part.rows.index(row)], axis=axis)
        size = float(np.linalg.norm(self._masked(expected, [row])))
        off = float(np.linalg.norm(self._masked(target - expected, [row])))
        return off / size if size else math.inf

    @property
    def tolerance(self) -> float:
        """Relative L2 distance that flips may explain at most: two correct engines end to end, over its layers.

        One that computes in a 16-bit format has more of them: the table for that format holds.
        """
        n_layers = len({taps.parse(op.output).layer for op in self.ops})
        kind = tap_class(self.output.op.output)
        factor = 1.0 if kind == "exact" else CLASSES[kind].error_factor
        formats = {self.arithmetic.of(op).format for op in self.ops}
        per_layer = max(FLOOR_PER_SQRT_LAYER[_POLICY.get(one, "independent")] for one in formats)
        return min(per_layer * math.sqrt(n_layers) * factor * SAFETY * WORST_TOKEN, LARGEST_TOLERANCE)

    def n_open(self, row: int) -> float:
        """Return how many ties a row depends on that nothing outside decides."""
        return sum(float(np.count_nonzero(t.rows == row)) for t in self.ties.values()) + self._undecided(row)


@dataclass(frozen=True)
class Outcome:
    """What was found about a segment."""

    segment: Segment
    beyond: frozenset[int]
    """Rows that no choice of flips explains."""
    excused: Mapping[int, float]
    """Rows that could not be explained, with their relative L2 distance."""

    @property
    def n_flips(self) -> int:
        """Activations that were found on the other side of a tie."""
        taps_read = {op.inputs[0] for op in self.segment.ops if isinstance(op.kind, BitLinear)}
        return sum(len(found) for (tap, _), found in self.segment.flips.items() if tap in taps_read)

    @property
    def within(self) -> float | None:
        """Largest distance of an excused row; None: there is none."""
        return max(self.excused.values(), default=None)

    def part_of(self, name: str) -> Part:
        """Return what the segment computed, with what the judgement decided about its rows."""
        failed = self.beyond | set(self.excused)
        return self.segment.part_of(name, {r: math.inf if r in failed else 0.0 for r in self.segment.output.rows})


def _first(preferred: Reading | None, found: tuple[Reading, ...]) -> tuple[Reading, ...]:
    return found if preferred not in found else (preferred, *(one for one in found if one != preferred))


def _fits(ratio: float) -> bool:
    return ratio <= 1.0
