"""Checks of an engine against itself: what they are, what follows from them, and how two runs become one.

``Notebook`` compares two runs of one engine and keeps the result as a check; ``check_status`` and ``decide`` are
pure functions of the numbers in it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from crossval.audit.bounds import SECOND_ORDER, U16, Arithmetic, U
from crossval.compare.rerun import Element, Names, assemble, compare_runs, worst_element
from crossval.compare.rows import Skip, TapRow, row_status
from crossval.formats import to_f16
from crossval.model import taps
from crossval.model.tolerance import Tolerance, tolerance_for
from crossval.passes import Numerics
from crossval.repeat.margins import usage
from crossval.repeat.metamorphic.cases import Expectation, PlannedCheck, Relation, place
from crossval.repeat.metamorphic.digests import TapDifference
from crossval.repeat.metamorphic.runs import Recorded, compare_taps
from crossval.repeat.metamorphic.scope import KQV, Form, compared_taps
from crossval.terms import Side

NOT_AGAIN = "the bits differ, and not when both runs are repeated: the engine is not deterministic"

CheckStatus = Literal["ok", "failed", "unchecked"]
MetamorphicVerdict = Literal["holds", "violated", "incomplete"]


@dataclass(frozen=True)
class MetamorphicCheck:
    """One relation in one case: two runs of the same engine over several taps."""

    name: Relation
    case: str
    """Which lengths, threads or kernels, and which taps where a relation is checked in parts."""
    side: Side
    """``candidate``, ``reference``, or whatever the caller calls the engine."""
    expectation: Expectation
    status: CheckStatus
    n_compared: int
    """Elements compared."""
    n_different: int
    """Elements whose bits differ; at least one of every token that was seen to differ."""
    n_invalid: int = 0
    """Taps that hold NaN or infinity, or whose shapes do not fit."""
    worst: float | None = None
    """``bits``: largest relative L2 difference of a tap. ``floor``: largest share of what is allowed; at most 1
    passes. None where undefined."""
    where: str | None = None
    """Tap, token (position) and pass of the first difference, or of the largest share."""
    missing: tuple[str, ...] = ()
    """Taps that had to be compared and could not be."""
    note: str | None = None
    element: Element | None = None
    """Of a check that failed: the element that differs most at ``where``, in both runs."""


@dataclass(frozen=True)
class MetamorphicResult:
    """All checks of one engine; ``n_required`` of them were asked for."""

    side: Side
    engine: str
    checks: tuple[MetamorphicCheck, ...]
    n_required: int

    @property
    def verdict(self) -> MetamorphicVerdict:
        """What all checks together say."""
        return decide(self.checks, self.n_required)


def check_status(check: MetamorphicCheck) -> CheckStatus:
    """Judge a check from its numbers; ``check.status`` is not read."""
    if check.n_invalid > 0:
        return "failed"
    if check.n_compared > 0:
        if check.expectation == "bits" and check.n_different != 0:
            return "failed"
        if check.expectation == "floor" and (check.worst is None or not check.worst <= 1.0):
            return "failed"
    return "unchecked" if check.missing or check.n_compared <= 0 else "ok"


def decide(checks: Sequence[MetamorphicCheck], n_required: int) -> MetamorphicVerdict:
    """Return the verdict: a failure violates; anything unchecked, or no check at all, is incomplete."""
    states = [check_status(check) for check in checks]
    if "failed" in states:
        return "violated"
    distinct = {(check.name, check.case, check.side) for check in checks}
    complete = 0 < n_required == len(checks) == len(distinct) and all(state == "ok" for state in states)
    return "holds" if complete else "incomplete"


def first_difference(made: Sequence[TapDifference], sizes: Sequence[int]) -> tuple[str, int | None] | None:
    """Return tap and token where bits first differ or are not finite, None when nowhere.

    The order is that of passes of ``sizes`` tokens, then of ``made``. The token is None where shapes do not fit.
    """
    ends = list(accumulate(sizes))
    places = [
        (0 if token is None else bisect_right(ends, token), index, token)
        for index, tap in enumerate(made)
        for token in (tap.tokens or ((None,) if tap.invalid else ()))
    ]
    if not places:
        return None
    _, index, token = min(places, key=lambda found: (*found[:2], -1 if found[2] is None else found[2]))
    return made[index].tap, token


@dataclass
class _Measured:
    """A second run of both, of taps whose digests differ: values that differ, relative L2, the worst element."""

    n_different: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, float | None] = field(default_factory=dict)
    element: Element | None = None


@dataclass
class Notebook:
    """The checks of one engine, made or not, in the order in which they were asked for."""

    side: Side
    numerics: Numerics
    n_layers: int
    names: Names
    """Every tap."""
    form: Form
    checks: list[MetamorphicCheck] = field(default_factory=list)

    def compare(self, case: PlannedCheck, one: Recorded, other: Recorded) -> None:
        """Make one check of two runs."""
        names = compared_taps(case, self.n_layers, self.form)
        if case.expectation == "bits":
            self._bits(case, one, other, names)
        elif case.part == "attention":
            self._attention(case, one, other)
        else:
            self._floor(case, one, other, names)

    def _bits(self, case: PlannedCheck, one: Recorded, other: Recorded, names: Sequence[str]) -> None:
        """Check for equal bits by digest; where they differ, run both again to count, measure and show."""
        found = list(compare_taps(names, one, other))
        made = [tap for tap in found if isinstance(tap, TapDifference)]
        skips = [tap for tap in found if isinstance(tap, Skip)]
        first = first_difference(made, one.sizes)
        again = self._measure(made, one, other, first)
        notes = {tap.note for tap in made if tap.note} | {skip.why for skip in skips}
        if any(again.n_different.get(tap.tap) == 0 for tap in made if tap.different):
            notes.add(NOT_AGAIN)
        self._append(
            self._empty(case),
            n_compared=sum(tap.n_elements for tap in made),
            # At least one of every token whose digests differ, whatever a second run of the engine gives.
            n_different=sum(max(len(tap.different), again.n_different.get(tap.tap, 0)) for tap in made),
            n_invalid=sum(tap.invalid for tap in made),
            worst=_largest([None if tap.invalid else again.sizes.get(tap.tap, 0.0) for tap in made]),
            where=None if first is None else place(*first, one.sizes, other.sizes),
            missing=tuple(skip.tap for skip in skips),
            note="; ".join(sorted(notes)) or None,
            element=again.element,
        )

    def _measure(
        self, made: Sequence[TapDifference], one: Recorded, other: Recorded, first: tuple[str, int | None] | None
    ) -> _Measured:
        """Run both again for the values of the taps that differ, as many at a time as memory allows."""
        found = _Measured()
        names = [tap.tap for tap in made if tap.tokens]
        for group in self.names.groups(names, one.chunks, other.chunks):
            sides = (one.values(group), other.values(group))
            for name in group:
                row = compare_runs(name, *sides, self._tolerance(name))
                if isinstance(row, TapRow):
                    found.n_different[name] = _n_different(row)
                    found.sizes[name] = None if row.nmse is None else math.sqrt(row.nmse)
            if first is not None and first[0] in group:
                found.element = worst_element(first[0], *sides, first[1])
        return found

    def unchecked(self, case: PlannedCheck, why: str) -> None:
        """Note a check that was asked for and could not be made."""
        self._append(self._empty(case), note=why)

    def _empty(self, case: PlannedCheck) -> MetamorphicCheck:
        return MetamorphicCheck(case.relation, case.case, self.side, case.expectation, "unchecked", 0, 0)

    # --- measuring --------------------------------------------------------------------------------------------

    def _tolerance(self, name: str) -> Tolerance:
        return tolerance_for(name, self.n_layers, "independent")

    def _attention(self, case: PlannedCheck, batch: Recorded, single: Recorded) -> None:
        """Hold layer 0's KQV to the rounding of attention weights to binary16 and the order of summation."""
        empty = self._empty(case)
        try:
            p, v = (assemble(batch.records, f"blk.0.{tap}") for tap in ("kq_soft_max", "v"))
            one, other = (assemble(side.records, KQV) for side in (batch, single))
        except ValueError as error:
            return self._append(empty, n_invalid=1, note=str(error))
        if p is None or v is None or one is None or other is None:
            return self._append(empty, missing=(KQV,), note="layer 0 was not recorded whole")
        n_heads, n_tokens, n_kv = p.array.shape
        n_kv_heads, head_dim = v.array.shape[1:]
        fits = one.array.shape == other.array.shape == (n_tokens, n_heads * head_dim)
        if not fits or one.positions != other.positions or n_heads % n_kv_heads or len(v.array) != n_kv:
            note = "the shapes of kqv_out, kq_soft_max and v do not fit"
            return self._append(empty, n_invalid=1, where=KQV, note=note)
        steps = Arithmetic(self.numerics, n_heads).sum_steps(32 * math.ceil(n_kv / 32))
        values = np.repeat(np.abs(to_f16(v.array)), n_heads // n_kv_heads, axis=1).transpose(1, 0, 2)
        weighted = np.abs(p.array.astype(np.float64)) @ values
        visible = np.tri(n_tokens, n_kv, n_kv - n_tokens) @ values
        # A weight below 2^-14 is subnormal in binary16: its error is absolute, half of 2^-24.
        allowed = SECOND_ORDER * (weighted * (U16 + 2 * (steps + 1) * U) + visible * 2.0**-25)
        bound = allowed.transpose(1, 0, 2).reshape(n_tokens, -1)
        with np.errstate(invalid="ignore"):
            difference = np.abs(one.array.astype(np.float64) - other.array)
        n_different = int(np.count_nonzero(one.array.view(np.uint32) != other.array.view(np.uint32)))
        if not (np.isfinite(difference).all() and np.isfinite(bound).all()):
            return self._append(empty, n_compared=difference.size, n_invalid=1, where=KQV, note="NaN or infinity")
        used = np.divide(difference, bound, out=np.where(difference > 0, np.inf, 0.0), where=bound > 0)
        token, feature = map(int, np.unravel_index(int(np.argmax(used)), used.shape))
        worst, position = float(used[token, feature]), one.positions[token]
        values = (float(one.array[token, feature]), float(other.array[token, feature]))
        return self._append(
            empty,
            n_compared=difference.size,
            n_different=n_different,
            worst=worst if math.isfinite(worst) else None,
            where=place(KQV, position, batch.sizes, single.sizes),
            element=None if worst <= 1.0 else Element(position, (feature,), values),
        )

    def _floor(self, case: PlannedCheck, one: Recorded, other: Recorded, names: Sequence[str]) -> None:
        """Hold the values of taps to what rounding allows; those of tensors that the model lacks are left out."""
        rows: list[TapRow | Skip] = []
        for name in names:
            optional = taps.is_optional(name)
            if not optional or any(name in record.taps for record in (*one.records, *other.records)):
                rows.append(compare_runs(name, one.records, other.records, self._tolerance(name)))
        made = [row for row in rows if isinstance(row, TapRow)]
        skips = [row for row in rows if isinstance(row, Skip)]
        invalid = [row for row in made if row_status(row) == "invalid"]
        worst = invalid[0] if invalid else max(made, key=lambda row: _or_infinite(usage(row)), default=None)
        notes = sorted({row.note for row in invalid if row.note} | {skip.why for skip in skips})
        token = None if worst is None else worst.worst_token
        check = replace(
            self._empty(case),
            n_compared=sum(row.n_elements for row in made),
            n_different=sum(_n_different(row) for row in made),
            n_invalid=len(invalid),
            worst=_largest([usage(row) for row in made]),
            where=None if worst is None else place(worst.tap, token, one.sizes, other.sizes),
            missing=tuple(skip.tap for skip in skips),
            note="; ".join(notes) or None,
        )
        if worst is not None and check_status(check) == "failed":
            found = worst_element(worst.tap, one.records, other.records, token)
            if found is not None:
                where = place(worst.tap, found.position, one.sizes, other.sizes)
                check = replace(check, where=where, element=found)
        self._append(check)

    def _append(self, check: MetamorphicCheck, **numbers: Any) -> None:
        check = replace(check, **numbers)
        self.checks.append(replace(check, status=check_status(check)))


def _n_different(row: TapRow) -> int:
    return row.n_elements - round((row.exact_match_rate or 0.0) * row.n_elements)


def _largest(values: Sequence[float | None]) -> float | None:
    """Return the largest value; None when there is none or one of them is undefined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return max(known) if known and len(known) == len(values) else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
