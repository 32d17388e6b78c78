"""One recorded output: recompute it from what its operation read, and judge it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit import bounds, overflow
from crossval.audit.bounds import Arithmetic, floats
from crossval.audit.checks import CheckStatus, OpCheck, Worst
from crossval.audit.segments import Outcome
from crossval.audit.state import Covered, Output
from crossval.formats import F32
from crossval.model.kinds import FloatArray, TernaryMatrix, Weight, widen
from crossval.model.op import WeightSource
from crossval.model.taps import shape_hint

Arrays = Sequence[npt.NDArray[Any]]


def check(output: Output, inputs: Arrays, weights: WeightSource, arithmetic: Arithmetic) -> OpCheck:
    """Judge an output against the specification of its recorded inputs."""
    op, unusable = output.op, invalid(output)
    arithmetic = arithmetic.of(op).storing(output.form_of_inputs(), output.form)
    loaded = [weights[name] for name in op.weights]
    if unusable is not None:
        return replace(unusable, note=_overflow(output, inputs, loaded) or unusable.note)
    if loaded and isinstance(loaded[0], TernaryMatrix):
        return _check_bitlinear(output, inputs[0], loaded, arithmetic)
    found = []
    for reading in bounds.readings(op, arithmetic, output.state.n_tokens, output.array.shape[0]):
        arrays = [reading.apply(index, array) for index, array in enumerate(inputs)]
        expected = op.function(*arrays, *loaded)
        allowed = bounds.bound(op, arrays, expected, loaded, arithmetic.reading(reading))
        allowed = allowed + arithmetic.cached(op, expected, output.array)
        inside = None
        if arithmetic.low:
            wrong = _outside(output, expected, allowed)
            inside = overflow.inside_norm(op, arrays, output.array, wrong, arithmetic)
        found.append(
            _judge(output, expected, allowed, reading=reading.name or None, note=inside, explained=bool(inside))
        )
    return best(found)


def best(checks: Sequence[OpCheck]) -> OpCheck:
    """Return the check of the reading that fits best."""
    return min(checks, key=lambda c: math.inf if c.ratio is None else c.ratio)


def check_head(
    output: Output,
    x: FloatArray,
    expected: FloatArray,
    norms: FloatArray,
    arithmetic: Arithmetic,
    reading: bounds.Reading,
) -> OpCheck:
    """Judge logits whose expected values were computed together with others'.

    ``x``: the head's input as the reading has it; ``norms``: of the table's rows.
    """
    unusable = invalid(output)
    if unusable is not None:
        why = overflow.of_results(output.array, expected) if np.isfinite(x).all() else None
        return replace(unusable, note=why or unusable.note)
    arithmetic = arithmetic.of(output.op).storing(output.form_of_inputs(), output.form)
    allowed = bounds.head_bound(x, norms, arithmetic.reading(reading), expected)
    return _judge(output, expected, allowed, reading=reading.name or None)


def _overflow(output: Output, inputs: Arrays, loaded: Sequence[Weight]) -> str | None:
    """Say that what is not finite is too large for a format, where finite inputs make it so; None otherwise."""
    if not all(np.isfinite(array).all() for array in inputs):
        return None
    try:
        expected = output.op.function(*map(widen, inputs), *loaded)
    except ValueError:  # an input of the wrong shape, which has its own check
        return None
    return overflow.of_results(output.array, expected)


def _check_bitlinear(
    output: Output, x: npt.NDArray[Any], weights: Sequence[Any], arithmetic: Arithmetic
) -> OpCheck:
    recorded, weight = output.array, weights[0]
    if recorded[0].size != weight.signs.shape[0] or x[0].size != weight.signs.shape[1]:
        misfit = f"shape {recorded.shape} from {x.shape} does not fit a matrix of {weight.signs.shape}"
        return _check(output, "invalid", note=misfit)
    x, flat, form = x.reshape(len(x), -1), recorded.reshape(len(recorded), -1), arithmetic.recorded
    if form is not F32 and not floats.is_float(arithmetic):
        # what no codes explain is wrong; what some explain is left open, for they need not be the engine's
        result = bounds.check_bitlinear(x, flat, weights, arithmetic, form)
        found = _judge(output, result.expected.reshape(recorded.shape), result.bound.reshape(recorded.shape))
        why = f"its input was recorded in {form.label} only, so its codes are not known"
        return found if found.wrong else unchecked(output, why)
    result = bounds.check_bitlinear(x, flat, weights, arithmetic, form)
    expected = result.expected.reshape(recorded.shape)
    allowed = result.bound.reshape(recorded.shape) + arithmetic.cached(output.op, expected, recorded)
    flips = f"{result.flips} int8 flips at rounding ties explain every integer" if result.flips else None
    inside = None
    if arithmetic.low:
        wrong = _outside(output, expected, allowed).reshape(flat.shape)
        inside = overflow.of_scales(x, weight.scale, flat, wrong, arithmetic)
    return _judge(output, expected, allowed, flips=result.flips, note=inside or flips, explained=bool(inside))


def _outside(output: Output, expected: FloatArray, allowed: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which elements are outside their bound; none where the shapes differ, which has its own check."""
    if expected.shape != output.array.shape:
        return np.zeros(output.array.shape, np.bool_)
    with np.errstate(invalid="ignore"):
        outside: npt.NDArray[np.bool_] = ~(np.abs(output.array - expected) <= allowed)
    return outside


def _judge(output: Output, expected: FloatArray, allowed: FloatArray, **facts: Any) -> OpCheck:
    """Compare elementwise with a derived bound."""
    shape = output.array.shape
    if expected.shape != shape:
        note = f"expected shape {expected.shape}, recorded {shape}"
        why = shape_hint(output.op.output, shape, expected.shape)
        return _check(output, "invalid", note=f"{note}: {why}" if why else note)
    residual = np.abs(output.array.astype(np.float64) - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(residual == 0, 0.0, residual / allowed)
    seen = output.visible
    ratio = ratio if seen is None else np.where(seen, ratio, 0.0)
    worst = _worst(output, ratio, expected, allowed)
    return _check(
        output,
        "ok" if worst["ratio"] is not None and worst["ratio"] <= 1 else "guilty",
        n_beyond=int(np.count_nonzero(~(ratio <= 1))),
        **worst,
        **facts,
    )


def _worst(output: Output, ratio: FloatArray, expected: FloatArray, allowed: FloatArray) -> dict[str, Any]:
    """Return the element with the largest ratio, and that ratio; None where it is not finite."""
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    index = [int(i) for i in at]
    position = output.state.plan.positions[output.rows[index.pop(output.op.token_axis)]]
    recorded = float(output.array[at])
    return {
        "ratio": float(ratio[at]) if math.isfinite(ratio[at]) else None,
        "worst": Worst(position, tuple(index), recorded, float(expected[at]), float(allowed[at])),
    }


# --- segments -------------------------------------------------------------------------------------------------


def judge_segment(output: Output, outcome: Outcome, covered: Covered) -> OpCheck:
    """Return the check of a settled segment: its rows outside their bound, else those that fit.

    It spans the operation and what it ``covered``, in this pass and, for what the KV cache holds, in those before.
    """
    found, n_ops = outcome.segment, 1 + len(covered)
    ratio, expected, allowed = found.ratio(found.parts)
    rows = [i for i, row in enumerate(output.rows) if row in outcome.beyond]
    rows = rows or [i for i, row in enumerate(output.rows) if row not in outcome.excused]
    worst: dict[str, Any] = {}
    if rows:
        shown, axis = np.full(ratio.shape, -1.0), output.op.token_axis
        shown.swapaxes(0, axis)[rows] = ratio.swapaxes(0, axis)[rows]
        worst = _worst(output, shown, expected, allowed)
    if outcome.excused and not outcome.beyond:
        worst.update(within=outcome.within, n_within=len(outcome.excused))
    n_flips = outcome.n_flips
    notes = [
        f"segment of {n_ops} operations",
        *(reading.name for reading in found.readings.values() if reading.name),
    ]
    if n_flips:
        notes.append(f"{n_flips} int8 flips at rounding ties explained")
    return _check(
        output,
        "guilty" if outcome.beyond else "within" if outcome.excused else "ok",
        n_beyond=len(outcome.beyond),
        n_ops=n_ops,
        flips=n_flips,
        note="; ".join(notes),
        **worst,
    )


def invalid(output: Output) -> OpCheck | None:
    """Return the check of a recorded tensor that cannot be judged as it is; None: it can."""
    array, axis, n_rows, why = output.array, output.op.token_axis, len(output.rows), ""
    if array.size == 0:
        why = "it has no elements"
    elif array.ndim <= axis or array.shape[axis] != n_rows:
        why = f"shape {array.shape} does not hold {n_rows} tokens"
    if why:
        return _check(output, "invalid", note=why)
    seen = output.visible
    n_bad = int(np.count_nonzero(~np.isfinite(array) & (True if seen is None else seen)))
    if not n_bad:
        return None
    return _check(output, "invalid", n_nonfinite=n_bad, note=f"{n_bad} of {array.size} values are not finite")


def unchecked(output: Output, why: str) -> OpCheck:
    """Return the check of a recorded tensor that nothing can be said about."""
    return _check(output, "unchecked", note=why)


def _check(output: Output, status: CheckStatus, **facts: Any) -> OpCheck:
    return OpCheck(
        pass_index=output.state.index,
        pass_kind=output.state.plan.kind,
        tap=output.op.output,
        status=status,
        n_elements=int(output.array.size),
        **{"ratio": None, "n_beyond": 0, **facts},
    )
