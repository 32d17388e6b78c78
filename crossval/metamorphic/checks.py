"""Checks of an engine against itself: what they are, what follows from them, and how two runs become one.

``Notebook`` compares two runs of one engine and keeps the result as a check; ``check_status`` and ``decide`` are
pure functions of the numbers in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from crossval import taps
from crossval.audit.bounds import SECOND_ORDER, U16, Arithmetic, U, to_f16
from crossval.compare import Skip, TapRow, row_status
from crossval.floors import FloorTable, measured_tolerance
from crossval.localize import MODEL_DEPENDENT_TAPS
from crossval.margins import usage
from crossval.metamorphic.cases import ALL_LAYERS, ATTENTION, UP_TO_ATTENTION, Expectation, Relation
from crossval.metamorphic.recorded import KQV, may_be_gathered, recorded_taps, up_to_attention
from crossval.rerun import Chunks, Element, assemble, compare_runs, run, worst_element
from crossval.runners.base import Numerics, PassRecord, Runner
from crossval.tolerance import Tolerance, tolerance_for

CheckStatus = Literal["ok", "failed", "unchecked"]
MetamorphicVerdict = Literal["holds", "violated", "incomplete"]


@dataclass(frozen=True)
class MetamorphicCheck:
    """One relation in one case: two runs of the same engine over several taps."""

    name: Relation
    case: str
    """Which lengths, threads or kernels, and which taps where a relation is checked in parts."""
    party: str
    """``candidate``, ``reference``, or whatever the caller calls the engine."""
    expectation: Expectation
    status: CheckStatus
    n_compared: int
    """Elements compared."""
    n_different: int
    """Elements whose bits differ."""
    n_invalid: int = 0
    """Taps that hold NaN or infinity, or whose shapes do not fit."""
    worst: float | None = None
    """``bits``: largest relative L2 difference of a tap. ``floor``: largest share of what is allowed; at most 1
    passes. None where undefined."""
    where: str | None = None
    """Tap and token (position) of the first difference, or of the largest share."""
    missing: tuple[str, ...] = ()
    """Taps that had to be compared and could not be."""
    note: str | None = None
    element: Element | None = None
    """Of a check that failed: the element that differs most at ``where``, in both runs."""


@dataclass(frozen=True)
class MetamorphicResult:
    """All checks of one engine; ``n_required`` of them were asked for."""

    party: str
    engine: str
    checks: tuple[MetamorphicCheck, ...]
    n_required: int
    verdict: MetamorphicVerdict


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
    distinct = {(check.name, check.case, check.party) for check in checks}
    complete = 0 < n_required == len(checks) == len(distinct) and all(state == "ok" for state in states)
    return "holds" if complete else "incomplete"


@dataclass(frozen=True)
class Recorded:
    """A run of an engine and what it recorded; can be run again for other taps."""

    runner: Runner
    chunks: Chunks
    records: tuple[PassRecord, ...]
    before: Chunks = ()
    """Another sequence that the engine ran just before, if that matters."""

    @classmethod
    def make(cls, runner: Runner, chunks: Chunks, select: Collection[str], before: Chunks = ()) -> Recorded:
        """Run the engine on ``before``, if given, then from an empty cache on ``chunks``."""
        if before:
            run(runner, before, ())
        return cls(runner, chunks, run(runner, chunks, select), before)

    def again(self, select: Collection[str]) -> Recorded:
        """Run the same once more for other taps."""
        return Recorded.make(self.runner, self.chunks, select, self.before)

    def beginning(self, n_passes: int) -> Recorded:
        """Return the first passes alone."""
        return Recorded(self.runner, self.chunks[:n_passes], self.records[:n_passes])


@dataclass
class Notebook:
    """The checks made of one engine. Every check that was asked for is counted, made or not."""

    party: str
    numerics: Numerics
    n_layers: int
    floors: FloorTable | None = None
    checks: list[MetamorphicCheck] = field(default_factory=list)
    n_required: int = 0

    @property
    def stated(self) -> bool:
        """Whether the engine says that it rounds as bitnet.cpp's family does."""
        return self.numerics.simd_width is not None and self.numerics.fused_quantizer is not None

    @property
    def names(self) -> list[str]:
        """Taps to record."""
        return recorded_taps(self.n_layers)

    def may_be_gathered(self, name: str) -> bool:
        """Tell whether engines need give this tap for the last token of a pass only."""
        return may_be_gathered(name, self.n_layers)

    def has_single_head(self, recorded: Recorded) -> bool:
        """Tell whether attention has one head: bitnet.cpp then keeps Q in binary32 in longer passes."""
        scores = recorded.records[0].taps.get("blk.0.kq")
        return scores is not None and scores.array.shape[0] == 1

    # --- checks -----------------------------------------------------------------------------------------------

    def bits(
        self, relation: Relation, case: str, one: Recorded, other: Recorded, names: Sequence[str] | None = None
    ) -> None:
        """Check for equal bits; where a layer differs, run both again to name its operation."""
        sides = (one, other)
        rows = self._compare(self.names if names is None else names, *sides)
        first = next((row for row in rows if isinstance(row, TapRow) and not row.bitwise_equal), None)
        if first is not None and taps.parse(first.tap).layer:  # layer 0 is already recorded whole
            ops = taps.layer_taps(taps.parse(first.tap).layer or 0)
            again = (one.again(ops), other.again(ops))
            closer = [
                row for row in self._compare(ops, *again) if isinstance(row, TapRow) and not row.bitwise_equal
            ]
            if closer:
                first, sides = closer[0], again
        self._note(relation, case, "bits", rows, sides, first)

    def same_form(
        self, relation: Relation, case: str, one: Recorded, other: Recorded, names: Sequence[str] | None = None
    ) -> None:
        """Check two runs whose passes all hold several tokens: one arithmetic, if the engine says so."""
        if self.stated:
            self.bits(relation, case, one, other, names)
        else:
            rows = self._compare(self.names if names is None else names, one, other)
            self._note(relation, case, "floor", rows, (one, other))

    def two_forms(self, relation: Relation, case: str, batch: Recorded, single: Recorded) -> None:
        """Check a run against one with passes of a single token: another arithmetic from layer 0's KQV on."""
        done: list[str] = []
        if self.stated:
            single_head = self.has_single_head(batch)
            done = up_to_attention(single_head=single_head)
            rows = self._compare(done, batch, single)
            self._note(relation, f"{case}, {UP_TO_ATTENTION}", "bits", rows, (batch, single))
            if not single_head:
                self._append(self._kqv(relation, f"{case}, {ATTENTION}", batch.records, single.records))
                done.append(KQV)
        rest = [name for name in self.names if name not in done]
        rows = self._compare(rest, batch, single)
        self._note(relation, f"{case}, {ALL_LAYERS}", "floor", rows, (batch, single))

    def unchecked(self, relation: Relation, case: str, why: str) -> None:
        """Note a check that was asked for and could not be made."""
        self._append(MetamorphicCheck(relation, case, self.party, "bits", "unchecked", 0, 0, note=why))

    # --- comparing --------------------------------------------------------------------------------------------

    def _compare(self, names: Sequence[str], one: Recorded, other: Recorded) -> list[TapRow | Skip]:
        """Compare taps of two runs; those of tensors that the model does not have are left out."""
        rows = []
        for name in names:
            optional = taps.parse(name).tap in MODEL_DEPENDENT_TAPS
            if optional and not any(name in record.taps for record in (*one.records, *other.records)):
                continue
            rows.append(compare_runs(name, one.records, other.records, self._tolerance(name)))
        return rows

    def _tolerance(self, name: str) -> Tolerance:
        measured = None if self.floors is None else measured_tolerance(name, self.floors)
        return measured or tolerance_for(name, self.n_layers, "independent")

    def _kqv(
        self, relation: Relation, case: str, batch: Sequence[PassRecord], single: Sequence[PassRecord]
    ) -> MetamorphicCheck:
        """Hold layer 0's KQV to the rounding of attention weights to binary16 and the order of summation."""
        empty = MetamorphicCheck(relation, case, self.party, "floor", "unchecked", 0, 0)
        try:
            p, v = assemble(batch, "blk.0.kq_soft_max"), assemble(batch, "blk.0.v")
            one, other = assemble(batch, KQV), assemble(single, KQV)
        except ValueError as error:
            return replace(empty, n_invalid=1, note=str(error))
        if p is None or v is None or one is None or other is None:
            return replace(empty, missing=(KQV,), note="layer 0 was not recorded whole")
        n_heads, n_tokens, n_kv = p.array.shape
        n_kv_heads, head_dim = v.array.shape[1:]
        fits = one.array.shape == other.array.shape == (n_tokens, n_heads * head_dim)
        if not fits or one.positions != other.positions or n_heads % n_kv_heads or len(v.array) != n_kv:
            return replace(
                empty, n_invalid=1, where=KQV, note="the shapes of kqv_out, kq_soft_max and v do not fit"
            )
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
            return replace(empty, n_compared=difference.size, n_invalid=1, where=KQV, note="NaN or infinity")
        used = np.divide(difference, bound, out=np.where(difference > 0, np.inf, 0.0), where=bound > 0)
        token, feature = map(int, np.unravel_index(int(np.argmax(used)), used.shape))
        worst, position = float(used[token, feature]), one.positions[token]
        values = (float(one.array[token, feature]), float(other.array[token, feature]))
        return replace(
            empty,
            n_compared=difference.size,
            n_different=n_different,
            worst=worst if math.isfinite(worst) else None,
            where=f"{KQV}, token {position}",
            element=None if worst <= 1.0 else Element(position, (feature,), values),
        )

    # --- noting -----------------------------------------------------------------------------------------------

    def _note(
        self,
        relation: Relation,
        case: str,
        expectation: Expectation,
        rows: Sequence[TapRow | Skip],
        sides: tuple[Recorded, Recorded],
        first: TapRow | None = None,
    ) -> None:
        """Keep a check made of several taps; ``first``: where in ``sides`` a difference of bits begins."""
        made = [row for row in rows if isinstance(row, TapRow)]
        skips = [row for row in rows if isinstance(row, Skip)]
        invalid = [row for row in made if row_status(row) == "invalid"]
        if expectation == "bits":
            sizes = [None if row.nmse is None else math.sqrt(row.nmse) for row in made]
            place = first or next((row for row in made if not row.bitwise_equal), None)
        else:
            sizes = [usage(row) for row in made]
            place = max(made, key=lambda row: _or_infinite(usage(row)), default=None)
        place = invalid[0] if invalid else place
        notes = sorted({row.note for row in invalid if row.note} | {skip.why for skip in skips})
        check = MetamorphicCheck(
            relation,
            case,
            self.party,
            expectation,
            "unchecked",
            n_compared=sum(row.n_elements for row in made),
            n_different=sum(_n_different(row) for row in made),
            n_invalid=len(invalid),
            worst=_largest(sizes),
            where=None if place is None else _place(place),
            missing=tuple(skip.tap for skip in skips),
            note="; ".join(notes) or None,
        )
        if place is not None and check_status(check) == "failed":
            found = worst_element(place.tap, sides[0].records, sides[1].records, place.worst_token)
            where = check.where if found is None else f"{place.tap}, token {found.position}"
            check = replace(check, where=where, element=found)
        self._append(check)

    def _append(self, check: MetamorphicCheck) -> None:
        self.n_required += 1
        self.checks.append(replace(check, status=check_status(check)))


def _n_different(row: TapRow) -> int:
    return row.n_elements - round((row.exact_match_rate or 0.0) * row.n_elements)


def _largest(values: Sequence[float | None]) -> float | None:
    """Return the largest value; None when there is none or one of them is undefined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return max(known) if known and len(known) == len(values) else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _place(row: TapRow) -> str:
    return row.tap if row.worst_token is None else f"{row.tap}, token {row.worst_token}"
