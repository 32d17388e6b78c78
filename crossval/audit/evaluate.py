"""One operation of one pass: gather what it read, recompute it, judge what was recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit import bounds, precision
from crossval.audit.bounds import Arithmetic, integers
from crossval.audit.checks import OpCheck, Worst
from crossval.audit.segments import Outcome
from crossval.audit.state import Covered, PassState
from crossval.formats import F32
from crossval.model.kinds import FloatArray, TernaryMatrix, Weight, widen
from crossval.model.op import Op, WeightSource
from crossval.model.taps import shape_hint, visible
from crossval.passes import TapArray


def check(
    op: Op,
    state: PassState,
    tap: TapArray,
    inputs: Sequence[npt.NDArray[Any]],
    weights: WeightSource,
    arithmetic: Arithmetic,
) -> OpCheck:
    """Judge one recorded output against the specification of its recorded inputs."""
    unusable = invalid(op, state, tap)
    loaded = [weights[name] for name in op.weights]
    if unusable is not None:
        return replace(unusable, note=_overflow(op, tap, inputs, loaded) or unusable.note)
    if loaded and isinstance(loaded[0], TernaryMatrix):
        return _check_bitlinear(op, state, tap, inputs[0], loaded[0], arithmetic)
    found = []
    for reading in bounds.readings(op, arithmetic, state.n_tokens, tap.array.shape[0]):
        arrays = round_inputs(inputs, reading)
        expected = op.function(*arrays, *loaded)
        allowed = bounds.bound(op, arrays, expected, loaded, arithmetic)
        allowed = allowed + arithmetic.cached(op, expected, tap.array)
        inside = precision.overflow_inside(op, arrays, tap.array, arithmetic)
        found.append(judge(op, state, tap, expected, allowed, reading=reading.name or None, note=inside))
    return best(found)


def _overflow(op: Op, tap: TapArray, inputs: Sequence[npt.NDArray[Any]], loaded: Sequence[Weight]) -> str | None:
    """Say that what is not finite is too large for a format, where finite inputs make it so; None otherwise."""
    if not all(np.isfinite(array).all() for array in inputs):
        return None
    try:
        expected = op.function(*map(widen, inputs), *loaded)
    except ValueError:  # an input of the wrong shape, which has its own check
        return None
    return precision.overflow(tap.array, expected)


def best(checks: Sequence[OpCheck]) -> OpCheck:
    """Return the check of the reading that fits best."""
    return min(checks, key=lambda c: math.inf if c.ratio is None else c.ratio)


def check_head(
    op: Op,
    state: PassState,
    tap: TapArray,
    x: FloatArray,
    expected: FloatArray,
    norms: FloatArray,
    arithmetic: Arithmetic,
    reading: bounds.Reading,
) -> OpCheck:
    """Judge recorded logits whose expected values were computed together with others'."""
    unusable = invalid(op, state, tap)
    if unusable is not None:
        why = precision.overflow(tap.array, expected) if np.isfinite(x).all() else None
        return replace(unusable, note=why or unusable.note)
    allowed = bounds.head_bound(x, norms, arithmetic, expected)
    return judge(op, state, tap, expected, allowed, reading=reading.name or None)


def round_inputs(arrays: Sequence[npt.NDArray[Any]], reading: bounds.Reading) -> list[npt.NDArray[Any]]:
    """Widen an op's inputs to float64, some of them through a 16-bit format."""
    return [reading.apply(index, array) for index, array in enumerate(arrays)]


def _check_bitlinear(
    op: Op,
    state: PassState,
    tap: TapArray,
    x: npt.NDArray[Any],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
) -> OpCheck:
    n_rows = tap.array.shape[0]
    if tap.array[0].size != weight.signs.shape[0] or x[0].size != weight.signs.shape[1]:
        misfit = f"shape {tap.array.shape} from {x.shape} does not fit a matrix of {weight.signs.shape}"
        return _check(op, state, "invalid", tap, note=misfit)
    if arithmetic.recorded is not F32:
        return _check_unknown_codes(op, state, tap, x.reshape(n_rows, -1), weight, arithmetic)
    result = integers.check(x.reshape(n_rows, -1), tap.array.reshape(n_rows, -1), weight, arithmetic)
    expected, allowed = result.expected.reshape(tap.array.shape), result.bound.reshape(tap.array.shape)
    allowed = allowed + arithmetic.cached(op, expected, tap.array)
    note = f"{result.flips} int8 flips at rounding ties explain every integer" if result.flips else None
    return judge(op, state, tap, expected, allowed, flips=result.flips, note=note)


def _check_unknown_codes(
    op: Op,
    state: PassState,
    tap: TapArray,
    x: npt.NDArray[Any],
    weight: TernaryMatrix,
    arithmetic: Arithmetic,
) -> OpCheck:
    """Convict what no codes explain; what some do is left open, for these need not be the engine's."""
    form = arithmetic.recorded
    result = integers.check_recorded(x, weight, arithmetic, form)
    expected, allowed = result.expected.reshape(tap.array.shape), result.bound.reshape(tap.array.shape)
    found = judge(op, state, tap, expected, allowed)
    if found.status == "guilty":
        return found
    return unchecked(op, state, tap, f"its input was recorded in {form.label} only, so its codes are not known")


def _wrong_shape(op: Op, state: PassState, tap: TapArray, expected: FloatArray) -> OpCheck:
    note = f"expected shape {expected.shape}, recorded {tap.array.shape}"
    why = shape_hint(op.output, tap.array.shape, expected.shape)
    return _check(op, state, "invalid", tap, note=f"{note}: {why}" if why else note)


def judge(
    op: Op,
    state: PassState,
    tap: TapArray,
    expected: FloatArray,
    allowed: FloatArray,
    *,
    flips: int = 0,
    reading: str | None = None,
    note: str | None = None,
) -> OpCheck:
    """Compare elementwise with a derived bound."""
    if expected.shape != tap.array.shape:
        return _wrong_shape(op, state, tap, expected)
    residual = np.abs(tap.array.astype(np.float64) - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(residual == 0, 0.0, residual / allowed)
    seen = _visible(op, state, tap)
    ratio = ratio if seen is None else np.where(seen, ratio, 0.0)
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    worst = float(ratio[at])
    return _check(
        op,
        state,
        "ok" if worst <= 1 else "guilty",
        tap,
        ratio=worst if math.isfinite(worst) else None,
        n_beyond=int(np.count_nonzero(~(ratio <= 1))),
        worst=_worst(op, state, tap, at, float(expected[at]), float(allowed[at])),
        flips=flips,
        reading=reading,
        note=note,
    )


# --- segments -------------------------------------------------------------------------------------------------


def judge_segment(op: Op, state: PassState, tap: TapArray, outcome: Outcome, covered: Covered) -> OpCheck:
    """Return the check of a settled segment: its rows outside their bound, else those that fit.

    It spans ``op`` and what it ``covered``, in this pass and, for what the KV cache holds, in those before.
    """
    ratio, expected, allowed = outcome.segment.ratio(outcome.segment.parts)
    axis = op.token_axis
    rows = outcome.segment.rows
    counted = [row for row in rows if row in outcome.beyond] or [row for row in rows if row not in outcome.excused]
    at: tuple[np.intp, ...] | None = None
    worst: float | None = None
    if counted:
        shown = np.zeros(len(rows), np.bool_)
        shown[[rows.index(row) for row in counted]] = True
        masked = np.where(shown if axis == 0 and ratio.ndim == 1 else _along(shown, axis, ratio.ndim), ratio, -1.0)
        at = np.unravel_index(int(np.argmax(masked)), ratio.shape)
        worst = float(ratio[at])
    status = "guilty" if outcome.beyond else "within" if outcome.excused else "ok"
    return _check(
        op,
        state,
        status,
        tap,
        ratio=worst if worst is not None and math.isfinite(worst) else None,
        n_beyond=len(outcome.beyond),
        n_ops=1 + len(covered),
        worst=None if at is None else _worst(op, state, tap, at, float(expected[at]), float(allowed[at])),
        flips=outcome.n_flips,
        within=outcome.within if status == "within" else None,
        n_within=len(outcome.excused) if status == "within" else 0,
        note=_segment_note(outcome, 1 + len(covered)),
    )


def _along(flags: npt.NDArray[np.bool_], axis: int, ndim: int) -> npt.NDArray[np.bool_]:
    shape = [1] * ndim
    shape[axis] = flags.size
    return flags.reshape(shape)


def _segment_note(outcome: Outcome, n_ops: int) -> str:
    found = outcome.segment
    parts = [f"segment of {n_ops} operations"]
    if str(found.choice):
        parts.append(str(found.choice))
    if outcome.n_flips:
        parts.append(f"{outcome.n_flips} int8 flips at rounding ties explained")
    return "; ".join(parts)


def invalid(op: Op, state: PassState, tap: TapArray) -> OpCheck | None:
    """Return the check of a recorded tensor that cannot be judged as it is; None: it can."""
    why = _misshapen(op, state, tap)
    if why is not None:
        return _check(op, state, "invalid", tap, note=why)
    seen = _visible(op, state, tap)
    n_bad = int(np.count_nonzero(~np.isfinite(tap.array) & (True if seen is None else seen)))
    if not n_bad:
        return None
    note = f"{n_bad} of {tap.array.size} values are not finite"
    return _check(op, state, "invalid", tap, n_nonfinite=n_bad, note=note)


def unchecked(op: Op, state: PassState, tap: TapArray, why: str) -> OpCheck:
    """Return the check of a recorded tensor that nothing can be said about."""
    return _check(op, state, "unchecked", tap, note=why)


def _visible(op: Op, state: PassState, tap: TapArray) -> npt.NDArray[np.bool_] | None:
    rows = state.all_rows if tap.rows is None else tap.rows
    return visible(op.output, tap.array.shape, [state.plan.positions[row] for row in rows])


def _misshapen(op: Op, state: PassState, tap: TapArray) -> str | None:
    if tap.array.size == 0:
        return "it has no elements"
    n_rows = state.n_tokens if tap.rows is None else len(tap.rows)
    if tap.array.ndim <= op.token_axis or tap.array.shape[op.token_axis] != n_rows:
        return f"shape {tap.array.shape} does not hold {n_rows} tokens"
    return None


def _worst(
    op: Op, state: PassState, tap: TapArray, at: tuple[np.intp, ...], expected: float, allowed: float
) -> Worst:
    index = [int(i) for i in at]
    row = index.pop(op.token_axis)
    token = row if tap.rows is None else tap.rows[row]
    return Worst(state.plan.positions[token], tuple(index), float(tap.array[at]), expected, allowed)


def _check(op: Op, state: PassState, status: Any, tap: TapArray, **facts: Any) -> OpCheck:
    facts = {"ratio": None, "n_beyond": 0, **facts}
    return OpCheck(
        pass_index=state.index,
        pass_kind=state.plan.kind,
        tap=op.output,
        status=status,
        n_elements=int(tap.array.size),
        **facts,
    )
