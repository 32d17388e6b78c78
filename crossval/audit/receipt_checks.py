"""The audits in a receipt checked for consistency: what must follow from their rows, the passes and the model.

Returns complaints, empty when all is well. What an engine computed is not in a receipt, so numbers can be checked
against each other only: a ratio against the values it is made of, counts against shapes, the verdict and the first
wrong operation against the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossval.audit import bounds, diagnosis_checks, extent, precision, products, summary
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import CheckStatus
from crossval.audit.summary import AuditRow, WorstElement
from crossval.formats import FORMATS
from crossval.model import taps
from crossval.model.kinds import BitLinear
from crossval.model.op import Op
from crossval.model.taps import token_axis
from crossval.passes import Numerics, PassPlan
from crossval.receipts.file import Receipt
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import number, plan_from_json
from crossval.terms import SIDES, Side
from crossval.traces import read as trace
from crossval.traces.read import TraceModel

_ROUNDING = 1e-9


@dataclass(frozen=True)
class _World:
    """What an audit has to fit."""

    shape: trace.TraceModel
    plan: tuple[PassPlan, ...]
    arithmetic: Arithmetic
    """What its operations were checked against."""
    stated: Numerics


def complaints(receipt: Receipt) -> list[str]:
    """Check both audits of a ``layers`` or ``diff`` receipt; a missing one is a complaint too."""
    if not receipt["results"]["passes"]:
        return ["there are no passes, so nothing was audited"]
    found = []
    for side in SIDES:
        audit = (receipt["audit"] or {}).get(side)
        if audit is None:
            found.append(f"the {side} was not audited")
            continue
        found += [f"audit of the {side}: {what}" for what in _audit(audit, _world(receipt, side))]
    return [*found, *diagnosis_checks.complaints(receipt), *_version(receipt)]


def demands(
    side: Side, audit: Mapping[str, Any] | None, policy: Policy, *, vouched: bool = False
) -> Iterator[GateCheck]:
    """Check that every operation of an engine was judged and is within its bound, and in which format.

    ``vouched``: its logits are bit-identical to those of the other engine, whose audit is clean.
    """
    verdict = summary.audit_verdict(audit)
    detail = f"{verdict}: there is none"
    if audit is not None:
        detail = f"{verdict}, {audit['n_covered']} of {audit['n_ops']} operations judged"
    if vouched:
        detail += "; its logits are bit-equal to those of the other engine, which is correct"
    accepted = verdict == "within" and policy.accepts(summary.within_of(audit))
    yield GateCheck(f"audit of the {side}", verdict == "clean" or vouched or accepted, detail)
    yield from products.demands(side, audit, policy)
    found = (audit or {}).get("precision")
    if found is None or found["scope"] == "some":
        return
    dtype, declared = found["dtype"], found["declared"]
    detail = f"{dtype}, {'as the engine states' if declared else 'which the engine does not state'}"
    if not declared:  # parity within it is less than parity
        detail += f"; accepted: {', '.join(policy.allow_precision) or 'none'}"
    yield GateCheck(f"precision of the {side}", declared or dtype in policy.allow_precision, detail)


def _version(receipt: Receipt) -> Iterator[str]:
    """Check that what older versions did not state is stated everywhere or nowhere."""
    audits = [audit for side in SIDES if (audit := (receipt["audit"] or {}).get(side)) is not None]
    rows = [row for audit in audits for row in audit["rows"]]
    places = [place for name in ("first_divergence", "first_inexact") if (place := receipt[name]) is not None]
    stated = [name in row for row in rows for name in ("n_segments", "within", "n_within")]
    stated += ["after" in place for place in places if "tap" in place]
    if any(stated) and not all(stated):
        yield "some rows say how they were judged, or where a difference entered, and others do not"


def _world(receipt: Receipt, side: str) -> _World:
    model, plan = TraceModel.of_receipt(receipt), plan_from_json(receipt["results"]["passes"])
    numerics = Numerics.from_json(receipt[side]["numerics"])
    audit = receipt["audit"][side]
    found, multiplied = precision.of_json(audit.get("precision")), products.of_json(audit.get("products"))
    return _World(model, plan, precision.arithmetic_of(numerics, found, model, multiplied), numerics)


def _audit(audit: Mapping[str, Any], world: _World) -> Iterator[str]:
    rows = [summary.row_from_json(row) for row in audit["rows"]]
    known = [row for row in rows if _known(row.tap, world)]
    yield from (f"the model has no tap {row.tap}" for row in rows if not _known(row.tap, world))
    order = [taps.execution_index(row.tap) for row in known]
    if order != sorted(set(order)):
        yield "rows are repeated or out of execution order"
    for row in known:
        yield from (f"{row.tap}: {what}" for what in _row(row, world))
    yield from _totals(audit, rows, world)
    yield from _precision(audit.get("precision"), world)
    multiplied = products.complaints(audit.get("products"), world.stated, world.arithmetic.numerics)
    yield from (f"products: {what}" for what in multiplied)
    yield from _first(audit["first_guilty"], rows, world)
    yield from _misrecorded(audit.get("misrecorded", ()), rows, world)
    verdict = summary.audit_verdict(audit)
    if audit["verdict"] != verdict:
        yield f"verdict is {audit['verdict']}, the rows say {verdict}"


def _misrecorded(found: Sequence[Mapping[str, Any]], rows: Sequence[AuditRow], world: _World) -> Iterator[str]:
    """Check that what was recorded incorrectly exists and was not judged all the same."""
    n_passes = {row.tap: row.n_passes for row in rows}
    for one in found:
        if max(one["passes"], default=-1) >= len(world.plan) or len(set(one["passes"])) != len(one["passes"]):
            yield f"misrecorded: passes {one['passes']} are not passes of this comparison"
            return
        for tap in one["taps"]:
            if not _known(tap, world):
                yield f"misrecorded: the model has no tap {tap}"
            elif one["kind"] == "tap" and n_passes.get(tap, 0) > len(world.plan) - 1:
                yield f"misrecorded: {tap} was judged in all passes"


def _known(tap: str, world: _World) -> bool:
    layer = taps.parse(tap).layer
    return layer is None or layer < world.shape.n_layers


def _totals(audit: Mapping[str, Any], rows: Sequence[AuditRow], world: _World) -> Iterator[str]:
    """Check how many operations there are and how many were judged; a model may lack optional ones."""
    n_ops, n_covered, n_passes = audit["n_ops"], audit["n_covered"], len(world.plan)
    model = world.shape
    known = taps.of_graph(model.architecture, bool(model.input_norms), model.pooling is not None)
    n_in_layer = sum(tap in taps.LAYER_TAPS for tap in known)
    n_lacking = 0 if model.input_norms else len(taps.SUB_NORMS.intersection(known))
    n_ends = len(known) - n_in_layer
    possible = [n_passes * (n_ends + model.n_layers * (n_in_layer - n)) for n in range(n_lacking + 1)]
    if n_ops not in possible:
        yield f"{n_ops} operations, {n_passes} passes of this model have {possible[0]}"
    least = sum(row.n_passes - row.n_unchecked for row in rows)
    most = min(n_ops, sum(row.n_ops for row in rows))
    if not least <= n_covered <= most:
        yield f"{n_covered} operations judged, the rows say {least} to {most}"


def _precision(found: Mapping[str, Any] | None, world: _World) -> Iterator[str]:
    """Check a finding of a 16-bit format: whether it follows from the counts, and which bounds it gives."""
    stated = world.stated.compute_dtype or "f32"
    if found is None:
        if world.stated.formats != {"f32"}:
            yield f"the engine states that it computes in {stated}, its precision was not looked at"
        return
    n_taps, n_held, exceptions = found["n_taps"], found["n_in_format"], found.get("exceptions", [])
    scope, every = found["scope"], n_held == n_taps
    if n_held > n_taps or (n_held > 0) != (found["n_values"] > 0):
        yield f"precision: {n_held} of {n_taps} tensors, {found['n_values']} values"
    enough = n_taps >= precision.MIN_TAPS and found["n_values"] >= precision.MIN_VALUES
    enough = enough and n_held >= precision.LEAST_IN_FORMAT * n_taps
    is_stated = scope == "mixed" or (scope == "all" and stated == found["dtype"])
    if found["declared"] != (is_stated and every):
        yield f"precision: declared is {found['declared']}, the engine states {stated}"
    if (scope == "mixed") != bool(world.stated.op_dtypes) or found["dtype"] not in (
        world.stated.formats if scope == "mixed" else FORMATS
    ):
        yield f"precision: {scope} in {found['dtype']}, which is not what the engine states"
    if scope in ("all", "recorded") and stated != found["dtype"] and not enough:
        yield f"precision: {n_held} of {n_taps} tensors do not show that everything is in {found['dtype']}"
    if (scope in ("all", "recorded")) == bool(found["ops"]) or (scope == "some" and every):
        yield f"precision: {scope} with {n_held} of {n_taps} tensors, {len(found['ops'])} operations"
    if bool(exceptions) != (scope in ("all", "recorded") and not every):
        yield f"precision: {len(exceptions)} exceptions, {n_held} of {n_taps} tensors are in the format"
    yield from (f"precision: the model has no tap {name}" for name in exceptions if not _known(name, world))
    u = bounds.U if scope == "some" else FORMATS[found["dtype"]].unit_roundoff
    if found["unit_roundoff"] != u:
        yield f"precision: unit_roundoff is {found['unit_roundoff']:.6g}, that of the bounds is {u:.6g}"


def _row(row: AuditRow, world: _World) -> Iterator[str]:
    status = summary.status_of(row)
    if row.status != status:
        yield f"status is {row.status}, its numbers say {status}"
    n_passes = len(world.plan)
    n_checked = row.n_passes - row.n_unchecked
    if not 0 < row.n_passes <= n_passes or n_checked < row.n_invalid:
        yield f"{row.n_passes} passes, {row.n_unchecked} unchecked and {row.n_invalid} invalid, of {n_passes}"
    if row.n_ops < n_checked:
        yield f"{row.n_ops} operations in {n_checked} checks"
    if row.n_segments is not None and not _segments_fit(row, n_checked):
        yield f"{row.n_segments} segments in {n_checked} checks of {row.n_ops} operations"
    if row.n_beyond > row.n_elements:
        yield f"{row.n_beyond} of {row.n_elements} elements beyond their bound"
    if (row.first_beyond is not None) != (row.n_beyond > 0 or row.n_invalid > 0):
        yield f"first_beyond is {row.first_beyond}, {row.n_beyond} elements are beyond their bound"
    if row.first_beyond is not None and row.first_beyond >= n_passes:
        yield f"first_beyond is {row.first_beyond} of {n_passes} passes"
    if (row.ratio is not None and row.ratio > 1.0) != (row.n_beyond > 0) and row.ratio is not None:
        yield f"ratio {row.ratio:.6g} contradicts {row.n_beyond} elements beyond their bound"
    if (row.within is None) != (row.n_within == 0):
        yield f"{row.n_within} tokens within {row.within}"
    if row.n_within and row.n_ops <= n_checked:
        yield "only a segment can be within a distance"
    yield from _elements(row, world)
    whole = row.n_invalid == row.n_unchecked == 0
    if row.worst is None and row.ratio is not None and whole:
        yield "a ratio without an element"
    if row.worst is not None and not 1 <= row.worst.n_ops <= row.n_ops - max(0, n_checked - 1):
        yield f"its worst check spans {row.worst.n_ops} of the {row.n_ops} operations in {n_checked} checks"
    yield from _numbers(row.tap, row.ratio, row.worst, row.reading, world)
    yield from _flips(row.tap, row.flips, row.segments > 0)


def _elements(row: AuditRow, world: _World) -> Iterator[str]:
    """Check the number of elements; an engine may give some tokens of a pass only."""
    if row.n_invalid:
        return
    ranges = [_element_range(row.tap, one, world) for one in world.plan]
    low = sum(low for low, _ in ranges) if row.n_passes == len(ranges) else 1
    high = sum(high for _, high in ranges)
    unit = world.shape.n_heads if token_axis(row.tap) else ranges[0][0]
    if not low <= row.n_elements <= high or not unit or row.n_elements % unit:
        yield f"{row.n_elements} elements, the model's shape gives {high} in all"


def _element_range(tap: str, one: PassPlan, world: _World) -> tuple[int, int]:
    """Return the elements of one token, and of all of a pass."""
    return (
        math.prod(trace.expected_shape(tap, world.shape, one, (0,))),
        math.prod(trace.expected_shape(tap, world.shape, one, None)),
    )


def _segments_fit(row: AuditRow, n_checked: int) -> bool:
    """Return whether so many segments make so many operations: each has two at least."""
    n_segments = row.n_segments or 0
    exact = row.n_ops == n_checked if n_segments == 0 else row.n_ops >= n_checked + n_segments
    return 0 <= n_segments <= n_checked and exact


def _segment(found: Mapping[str, Any], world: _World) -> Iterator[str]:
    """Check that a wrong segment's range ends where it is judged and holds the taps it asks for."""
    segment = found.get("segment")
    if segment is None:
        return
    names = [segment["first_op"], *segment["record"]]
    if any(not _known(name, world) for name in names):
        yield "its segment names taps the model lacks"
        return
    order = [taps.execution_index(name) for name in (*names, found["tap"])]
    layers = extent.layers_of((*names, found["tap"]))
    ends = (layers[0], layers[-1]) if layers else (None, None)
    first = segment["first_layer"], segment["last_layer"]
    if found["n_ops"] < 2 or min(order) != order[0] or max(order) != order[-1] or len(set(order)) < 2:
        yield "its segment does not end at it"
    elif first != ends and taps.parse(found["tap"]).layer is not None:
        yield f"its segment spans layers {first}, its taps {ends}"


def _flips(tap: str, flips: int, segment: bool) -> Iterator[str]:
    """Check that int8 activations explain only what quantises: a BitLinear, or a segment, which may have some."""
    if flips and not segment and not isinstance(taps.op_of(tap).kind, BitLinear):
        yield f"{flips} int8 flips in an operation without int8"


def _numbers(
    tap: str, ratio: float | None, worst: WorstElement | None, reading: str | None, world: _World
) -> Iterator[str]:
    """Check the worst element: where it is, and that its ratio is made of its values."""
    op = taps.op_of(tap)
    if worst is None:
        return
    if worst.pass_index >= len(world.plan) or world.plan[worst.pass_index].kind != worst.pass_kind:
        yield f"there is no {worst.pass_kind} pass {worst.pass_index}"
        return
    one = world.plan[worst.pass_index]
    per_token = list(trace.expected_shape(tap, world.shape, one, (0,)))
    del per_token[token_axis(tap)]
    inside = len(per_token) == len(worst.index) and all(
        i < n for i, n in zip(worst.index, per_token, strict=False)
    )
    if worst.token not in one.positions or not inside:
        yield f"position {worst.token}, index {list(worst.index)} is not in pass {worst.pass_index}"
    with np.errstate(over="ignore"):
        narrow = float(np.float32(worst.recorded))
    if narrow != worst.recorded:
        yield f"recorded {worst.recorded!r} is not a float32"
    if not _belongs(ratio, worst):
        gap = abs(worst.recorded - worst.expected)
        yield f"ratio {ratio} is not {gap:.6g} over the bound {worst.bound:.6g}"
    if worst.n_ops == 1 and bounds.is_one_rounding(op) and world.arithmetic.low:
        steps, fixed = bounds.one_rounding(world.arithmetic)
        wanted = steps * abs(worst.expected) + fixed
        if not math.isclose(worst.bound, wanted, rel_tol=_ROUNDING):
            yield f"bound {worst.bound:.6g} is not one rounding of {worst.expected:.6g}, which is {wanted:.6g}"
    allowed = _readings(op, one, world) if worst.n_ops == 1 else set()
    if (reading not in allowed) if allowed else (reading is not None):
        yield f"reading {reading!r} is not one of this engine's"


def _belongs(ratio: float | None, worst: WorstElement) -> bool:
    """Return whether a ratio is the element's distance over its bound.

    Segments judged before 0.2 state the relative L2 distance of a whole token: their ratio is not checked.
    """
    gap = abs(worst.recorded - worst.expected)
    if worst.bound < 0.0 or (ratio is not None and ratio < 0.0):
        return False
    if worst.n_ops > 1:
        return True
    if gap == 0.0:
        return ratio == 0.0
    wanted = number(gap / worst.bound) if worst.bound > 0.0 else None
    if wanted is None or ratio is None:
        return ratio is wanted
    return math.isclose(ratio, wanted, rel_tol=_ROUNDING)


def _readings(op: Op, one: PassPlan, world: _World) -> set[str]:
    """Return the names of the readings an engine of this family may have; empty: there is no choice."""
    rows = (1, 2) if len(one.token_ids) > 1 else (1,)
    return {r.name for n in rows for r in bounds.readings(op, world.arithmetic, len(one.token_ids), n)} - {""}


def _first(found: Mapping[str, Any] | None, rows: Sequence[AuditRow], world: _World) -> Iterator[str]:
    """Check the first wrong operation against its row."""
    place = summary.first_place([row for row in rows if _known(row.tap, world)])
    stated = None if found is None else (found["pass_index"], found["tap"])
    if stated != place:
        yield f"first wrong is {stated}, the rows say {place}"
        return
    if found is None or place is None or place[0] >= len(world.plan):
        return
    where = f"first wrong, {found['tap']}"
    row = next(row for row in rows if row.tap == found["tap"])
    name = taps.parse(found["tap"])
    one = world.plan[found["pass_index"]]
    if (found["layer"], found["op"], found["pass_kind"]) != (name.layer, name.tap, one.kind):
        yield f"{where}: layer, operation or kind of pass do not fit"
    status = _check_status(found)
    if found["status"] != status or (status == "invalid" and not row.n_invalid):
        yield f"{where}: status is {found['status']}, its numbers say {status}"
    for count in ("n_elements", "n_beyond", "n_ops", "flips"):
        whole = getattr(row, count)
        if found[count] > whole or (row.n_passes == 1 and found[count] != whole):
            yield f"{where}: {count} is {found[count]}, in all passes {whole}"
    low, high = _element_range(found["tap"], one, world)
    if status != "invalid" and (not 0 < low <= found["n_elements"] <= high or found["n_elements"] % low):
        yield f"{where}: {found['n_elements']} elements, the model's shape gives {high}"
    worst = summary.row_from_json({**vars(row), "worst": found["worst"]}).worst
    yield from (f"{where}: {what}" for what in _segment(found, world))
    if worst is not None and (worst.pass_index, worst.n_ops) != (found["pass_index"], found["n_ops"]):
        yield f"{where}: its worst element is of another check"
    if row.worst is not None and row.worst.pass_index == found["pass_index"]:
        same = replace(row, ratio=found["ratio"], worst=worst, reading=found["reading"], note=found["note"])
        if same != row:
            yield f"{where}: it is not what its row shows of the same pass"
    elif row.ratio is not None and (found["ratio"] or 0.0) > row.ratio:
        yield f"{where}: ratio {found['ratio']:.6g} is above the worst of all passes"
    numbers = _numbers(found["tap"], found["ratio"], worst, found["reading"], world)
    flips = _flips(found["tap"], found["flips"], found["n_ops"] > 1)
    yield from (f"{where}: {what}" for what in (*numbers, *flips))


def _check_status(found: Mapping[str, Any]) -> CheckStatus:
    """Judge a single check from its numbers."""
    beyond = found["n_beyond"] > 0 and (found["ratio"] is None or found["ratio"] > 1.0)
    empty = found["n_beyond"] == 0 and found["ratio"] is None and found["worst"] is None
    return "guilty" if beyond else "invalid" if empty else "ok"
