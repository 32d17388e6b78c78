"""One engine's audit as a receipt holds it: a row per operation, and the pure functions from rows to a verdict.

A row is about one tap in all passes: counts over all of them, and the worst check. The builder and the gate share
these functions, so a verdict in a receipt is correct exactly when it follows from its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from crossval.audit import extent
from crossval.audit.checks import (
    AuditResult,
    AuditVerdict,
    CheckStatus,
    OpCheck,
    Worst,
    in_order,
    unless_misrecorded,
    verdict_of_states,
)
from crossval.model import taps
from crossval.model.kinds import BitLinear
from crossval.passes import PassKind
from crossval.receipts.once import once
from crossval.receipts.values import number

_SEVERITY: dict[CheckStatus, int] = {"ok": 0, "within": 0, "unchecked": 1, "invalid": 2, "guilty": 3}


@dataclass(frozen=True, kw_only=True)
class WorstElement(Worst):
    """The element with the largest ratio to its bound, in any pass."""

    pass_index: int
    pass_kind: PassKind
    n_ops: int
    """Operations between the recorded inputs and this output: 1, or more for a segment."""


@dataclass(frozen=True)
class AuditRow:
    """One tap of one engine, over all passes."""

    tap: str
    n_passes: int
    """Passes in which it was recorded."""
    n_unchecked: int
    """Of these, passes in which nothing could be judged."""
    n_invalid: int
    """Of these, passes in which it holds NaN or infinities, or has the wrong shape."""
    n_elements: int
    n_beyond: int
    """Elements (of a segment: tokens) outside their bound."""
    n_ops: int
    """Operations its checks span, added over the passes."""
    ratio: float | None
    """Largest ``|recorded - expected| / bound``; null: infinite (the bound is 0), or nothing could be computed."""
    status: CheckStatus
    first_beyond: int | None
    """First pass in which it is wrong or invalid."""
    flips: int
    """Int8 activations on the other side of a rounding tie that explain a BitLinear's integers exactly."""
    worst: WorstElement | None
    reading: str | None
    """Where the engine rounds to binary16, in the worst pass, for operations that leave a choice."""
    note: str | None
    within: float | None = None
    """Of segments: largest relative L2 distance of a token that int8 flips may explain but were not shown to."""
    n_within: int = 0
    """How many tokens that are, over all passes."""
    n_segments: int | None = None
    """Of its checks, how many span several operations; None in receipts of older versions."""

    @property
    def segments(self) -> int:
        """How many checks span several operations, at most."""
        n_checked = self.n_passes - self.n_unchecked
        if self.n_segments is not None:
            return self.n_segments
        return n_checked if self.n_ops > n_checked else 0


@dataclass(frozen=True)
class Depth:
    """How finely an engine was judged."""

    n_single: int
    """Operations judged by themselves."""
    n_segments: int
    """Segments of several operations, each judged by its end."""
    n_inside: int
    """Operations inside them."""


def depth(audit: Mapping[str, Any]) -> Depth:
    """Return how many operations of an audit were judged by themselves, and how many inside segments."""
    rows = [row_from_json(row) for row in audit["rows"]]
    n_segments = sum(row.segments for row in rows)
    n_single = sum(row.n_passes - row.n_unchecked for row in rows) - n_segments
    return Depth(n_single, n_segments, max(0, audit["n_covered"] - n_single) if n_segments else 0)


def status_of(row: AuditRow) -> CheckStatus:
    """Judge a row from its numbers alone; ``row.status`` is not read."""
    if row.n_beyond > 0 or (row.ratio is not None and not row.ratio <= 1.0):
        return "guilty"
    if row.n_invalid > 0:
        return "invalid"
    if row.n_unchecked > 0 or row.n_passes <= 0 or row.n_elements <= 0:
        return "unchecked"
    if row.within is not None or row.n_within > 0:
        return "within"
    return "unchecked" if row.ratio is None else "ok"


def verdict_of(rows: Sequence[AuditRow], n_ops: int, n_covered: int) -> AuditVerdict:
    """Return the verdict that follows from the rows, as ``checks.decide`` does from the checks."""
    return verdict_of_states([status_of(row) for row in rows], n_ops, n_covered)


def within_of(audit: Mapping[str, Any] | None) -> float:
    """Return the largest distance below which an engine's audit in a receipt shows nothing; 0.0: there is none."""
    rows = [] if audit is None else [row_from_json(row) for row in audit["rows"]]
    return max((row.within for row in rows if row.within is not None), default=0.0)


def unsettled(rows: Sequence[AuditRow], n_layers: int) -> str | None:
    """Say which tensors would have to be recorded to judge the segments that are ``within``; None: there are none.

    What an engine quantises settles where its int8 activations lie.
    """
    recorded = {row.tap for row in rows}
    layers: set[int] = set()
    for row in rows:
        if status_of(row) == "within":
            last = taps.parse(row.tap).layer
            last = first = n_layers - 1 if last is None else last
            while first > 0 and f"blk.{first - 1}.{taps.LAYER_TAPS[-1]}" not in recorded:
                first -= 1
            layers.update(range(first, last + 1))
    if not layers:
        return None
    read = (op.inputs[0] for op in taps.OPS.values() if isinstance(op.kind, BitLinear))
    quantised = dict.fromkeys(taps.parse(name).tap for name in read)
    return f"{extent.listed(quantised)} (the quantised tensors) of {extent.numbers('layer', sorted(layers))}"


def first_place(rows: Iterable[AuditRow]) -> tuple[int, str] | None:
    """Return pass and tap of the first wrong operation: earliest pass, then earliest in execution order."""
    places = [(row.first_beyond, row.tap) for row in rows if row.first_beyond is not None]
    return min(places, key=in_order, default=None)


def rows_of(result: AuditResult) -> list[AuditRow]:
    """Gather the checks of each tap into a row, in execution order."""
    found: dict[str, list[OpCheck]] = {}
    for check in result.checks:
        found.setdefault(check.tap, []).append(check)
    return [_row(tap, found[tap]) for tap in sorted(found, key=taps.execution_index)]


def _row(tap: str, checks: Sequence[OpCheck]) -> AuditRow:
    worst = max(checks, key=_badness)
    written = worst_of(worst)
    checked = [check for check in checks if check.status != "unchecked"]
    beyond = [check.pass_index for check in checks if check.wrong]
    ratios = [check.ratio for check in checks if check.ratio is not None]
    endless = any(check.status == "guilty" and check.ratio is None for check in checks)
    endless |= worst.worst is not None and written is None  # a ratio is the distance of an element that is shown
    row = AuditRow(
        tap=tap,
        n_passes=len(checks),
        n_unchecked=len(checks) - len(checked),
        n_invalid=sum(check.status == "invalid" for check in checks),
        n_elements=sum(check.n_elements for check in checks),
        n_beyond=sum(check.n_beyond for check in checks),
        n_ops=sum(check.n_ops for check in checked),
        ratio=None if endless else number(max(ratios, default=None)),
        status=worst.status,
        first_beyond=min(beyond, default=None),
        flips=sum(check.flips for check in checks),
        worst=written,
        reading=worst.reading,
        note=worst.note,
        within=max((check.within for check in checks if check.within is not None), default=None),
        n_within=sum(check.n_within for check in checks),
        n_segments=sum(check.n_ops > 1 for check in checked),
    )
    return replace(row, status=status_of(row))


def _badness(check: OpCheck) -> tuple[int, float]:
    """Order checks by status, then by how far they are off; None in a wrong one is an infinite ratio."""
    endless = math.inf if check.status == "guilty" else -1.0
    return _SEVERITY[check.status], endless if check.ratio is None else check.ratio


def worst_of(check: OpCheck) -> WorstElement | None:
    """Return the worst element of a check; None when it has none, or its numbers cannot be written."""
    found = check.worst
    if found is None or None in map(number, (found.recorded, found.expected, found.bound)):
        return None
    return WorstElement(**vars(found), pass_index=check.pass_index, pass_kind=check.pass_kind, n_ops=check.n_ops)


# --- JSON -----------------------------------------------------------------------------------------------------


def to_json(result: AuditResult) -> dict[str, Any]:
    """Return an audit as the receipt's ``audit.candidate`` or ``audit.reference``."""
    rows = rows_of(result)
    verdict = verdict_of(rows, result.n_ops, result.n_covered)
    data = {
        "n_ops": result.n_ops,
        "n_covered": result.n_covered,
        "verdict": unless_misrecorded(verdict, len(result.misrecorded)),
        "first_guilty": None if result.first_guilty is None else check_to_json(result.first_guilty),
        "rows": [row_to_json(row) for row in rows],
        **({} if result.precision is None else {"precision": result.precision.to_json()}),
        **({} if result.products is None else {"products": result.products.to_json()}),
    }
    found = [{**asdict(one), "taps": list(one.taps), "passes": list(one.passes)} for one in result.misrecorded]
    return {**data, "misrecorded": found} if found else data


def row_to_json(row: AuditRow) -> dict[str, Any]:
    """Return a row as JSON; its status is recomputed."""
    data = {**vars(row), "worst": _worst_to_json(row.worst), "status": status_of(row)}
    if row.n_segments is None:
        del data["n_segments"]
    return data


def _worst_to_json(worst: WorstElement | None) -> dict[str, Any] | None:
    return None if worst is None else {**vars(worst), "index": list(worst.index)}


def row_from_json(data: Mapping[str, Any]) -> AuditRow:
    """Return the row of a receipt that is valid by the schema."""
    worst = data["worst"]
    if worst is not None:
        worst = WorstElement(**{**worst, "index": tuple(worst["index"])})
    return AuditRow(**{**data, "worst": worst})


_CHECK_FIELDS = (
    "status", "ratio", "n_elements", "n_beyond", "n_ops", "flips", "reading", "note", "within", "n_within",
)  # fmt: skip
"""Fields of a check that a receipt states as they are."""


def check_to_json(check: OpCheck) -> dict[str, Any]:
    """Return one wrong check as JSON, with its layer and operation spelt out."""
    name, segment = taps.parse(check.tap), extent.of_check(check)
    return {
        "tap": check.tap,
        "layer": name.layer,
        "op": name.tap,
        "pass_index": check.pass_index,
        "pass_kind": check.pass_kind,
        **{name: getattr(check, name) for name in _CHECK_FIELDS},
        "ratio": number(check.ratio),
        "worst": _worst_to_json(worst_of(check)),
        **({} if segment is None else {"segment": segment}),
    }


@once
def audit_verdict(audit: Mapping[str, Any] | None) -> AuditVerdict:
    """Return the verdict of an engine's audit in a receipt, from its rows; a missing one is incomplete."""
    if audit is None:
        return "incomplete"
    verdict = verdict_of([row_from_json(row) for row in audit["rows"]], audit["n_ops"], audit["n_covered"])
    return unless_misrecorded(verdict, len(audit.get("misrecorded", ())))
