"""One operation of one pass: gather what it read, recompute it, judge what was recorded.

A tensor that an engine did not record is computed from what it did record; the next recorded one is then judged
as the output of a *segment* of several operations, with a tolerance for int8 flips instead of a derived bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval import taps
from crossval.audit import bitlinear, bounds
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import OpCheck, Worst
from crossval.geometry import token_axis
from crossval.ops import FloatArray, Op, TernaryMatrix, Weight, WeightSource
from crossval.runners.base import PassPlan, TapArray
from crossval.tolerance import CLASSES, FLOOR_PER_SQRT_LAYER, SAFETY, WORST_TOKEN, tap_class

Covered = frozenset[tuple[int, str]]
"""Operations, as (pass index, output tap), whose results were computed here and not recorded."""
CONTEXT_INPUTS = ("token_ids", "positions")


@dataclass(frozen=True)
class Value:
    """An array an operation reads: recorded by the engine, or computed here because it was not."""

    array: npt.NDArray[Any]
    rows: tuple[int, ...]
    """Token indices within the pass; for KV state, cells."""
    computed: Covered = frozenset()


@dataclass
class PassState:
    """What is known of one pass of one engine while its layers are audited in order."""

    index: int
    plan: PassPlan
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return len(self.plan.token_ids)

    @property
    def all_rows(self) -> tuple[int, ...]:
        """Every token index of the pass."""
        return tuple(range(self.n_tokens))

    def value(self, name: str) -> Value | None:
        """Return what an op reads under this name; None when it is neither recorded nor computable."""
        if name == "token_ids":
            return Value(np.asarray(self.plan.token_ids, np.int64), self.all_rows)
        if name == "positions":
            return Value(np.asarray(self.plan.positions, np.int64), self.all_rows)
        return self.values.get(name)


def recorded_value(name: str, tap: TapArray, n_tokens: int) -> Value:
    """Wrap a recorded tap."""
    return Value(tap.array, tuple(range(n_tokens)) if tap.rows is None else tap.rows)


def is_state(name: str) -> bool:
    """Return whether an input is KV state, which has cells and not tokens."""
    return name.endswith(("k_cache", "v_cache"))


def _take(name: str, value: Value, rows: Sequence[int]) -> npt.NDArray[Any] | None:
    """Return the rows of an input that belong to the output's rows; None when one is missing."""
    if is_state(name) or tuple(rows) == value.rows:
        return value.array
    where = {row: i for i, row in enumerate(value.rows)}
    if any(row not in where for row in rows):
        return None
    axis = 0 if name in CONTEXT_INPUTS else token_axis(name)
    taken: npt.NDArray[Any] = np.take(value.array, [where[row] for row in rows], axis=axis)
    return taken


@dataclass(frozen=True)
class Gathered:
    """An op's inputs, cut to the rows of its output."""

    arrays: tuple[npt.NDArray[Any], ...]
    computed: Covered


def gather(op: Op, state: PassState, rows: Sequence[int]) -> Gathered | str:
    """Collect an op's inputs; a string says which one is missing."""
    arrays: list[npt.NDArray[Any]] = []
    computed: set[tuple[int, str]] = set()
    for name in op.inputs:
        value = state.value(name)
        array = None if value is None else _take(name, value, rows)
        if value is None or array is None:
            return f"its input {name} was not recorded and cannot be computed"
        arrays.append(array)
        computed |= value.computed
    return Gathered(tuple(arrays), frozenset(computed))


def compute(op: Op, state: PassState, weights: WeightSource) -> Value | None:
    """Compute an output that was not recorded, for as many rows as its inputs have; None when they lack."""
    token_inputs = [state.value(name) for name in op.inputs if not is_state(name) and name not in CONTEXT_INPUTS]
    rows = state.all_rows
    for value in token_inputs:
        if value is None:
            return None
        rows = tuple(row for row in rows if row in value.rows)
    if op.last_row_only:
        rows = rows[-1:]
    inputs = gather(op, state, rows)
    if not rows or isinstance(inputs, str):
        return None
    output = op.function(*map(_widen, inputs.arrays), *(weights[name] for name in op.weights))
    return Value(output, rows, inputs.computed | {(state.index, op.output)})


def check(
    op: Op, state: PassState, tap: TapArray, inputs: Gathered, weights: WeightSource, arithmetic: Arithmetic
) -> OpCheck:
    """Judge one recorded output against the specification of its inputs."""
    invalid = _invalid(op, state, tap)
    if invalid is not None:
        return _check(op, state, "invalid", tap, note=invalid)
    loaded = [weights[name] for name in op.weights]
    if inputs.computed:
        expected = op.function(*map(_widen, inputs.arrays), *loaded)
        return judge_segment(op, state, tap, expected, inputs.computed)
    if op.name in bounds.BITLINEARS:
        return _check_bitlinear(op, state, tap, inputs.arrays[0], _ternary(loaded[0]), arithmetic)
    found = []
    for reading in bounds.readings(op, arithmetic, state.n_tokens, tap.array.shape[0]):
        arrays = round_inputs(inputs.arrays, reading)
        expected = op.function(*arrays, *loaded)
        allowed = bounds.bound(op, arrays, expected, loaded, arithmetic)
        found.append(judge(op, state, tap, expected, allowed, reading=reading.name or None))
    return best(found)


def best(checks: Sequence[OpCheck]) -> OpCheck:
    """Return the check of the reading that fits best."""
    return min(checks, key=lambda c: math.inf if c.ratio is None else c.ratio)


def check_head(
    op: Op,
    state: PassState,
    tap: TapArray,
    x: FloatArray,
    expected: FloatArray,
    computed: Covered,
    norms: FloatArray,
    arithmetic: Arithmetic,
    reading: bounds.Reading,
) -> OpCheck:
    """Judge recorded logits whose expected values were computed together with others'."""
    invalid = _invalid(op, state, tap)
    if invalid is not None:
        return _check(op, state, "invalid", tap, note=invalid)
    if computed:
        return judge_segment(op, state, tap, expected, computed)
    allowed = bounds.head_bound(x, norms, arithmetic)
    return judge(op, state, tap, expected, allowed, reading=reading.name or None)


def round_inputs(arrays: Sequence[npt.NDArray[Any]], reading: bounds.Reading) -> list[npt.NDArray[Any]]:
    """Widen an op's inputs to float64, some of them through binary16."""
    return [bounds.to_f16(a) if r else _widen(a) for a, r in zip(arrays, reading.rounded, strict=True)]


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
    result = bitlinear.check(x.reshape(n_rows, -1), tap.array.reshape(n_rows, -1), weight, arithmetic)
    expected, allowed = result.expected.reshape(tap.array.shape), result.bound.reshape(tap.array.shape)
    note = f"{result.flips} int8 flips at rounding ties explain every integer" if result.flips else None
    return judge(op, state, tap, expected, allowed, flips=result.flips, note=note)


def _ternary(weight: Weight) -> TernaryMatrix:
    assert isinstance(weight, TernaryMatrix)  # the op table pairs BitLinear with ternary matrices only
    return weight


def _wrong_shape(op: Op, state: PassState, tap: TapArray, expected: FloatArray) -> OpCheck:
    return _check(op, state, "invalid", tap, note=f"expected shape {expected.shape}, recorded {tap.array.shape}")


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
    ratio = np.where(_visible(op, state, tap), ratio, 0.0)
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


def judge_segment(op: Op, state: PassState, tap: TapArray, expected: FloatArray, computed: Covered) -> OpCheck:
    """Compare token by token in relative L2, with the tolerance of independent arithmetic over the segment."""
    if expected.shape != tap.array.shape:
        return _wrong_shape(op, state, tap, expected)
    visible = _visible(op, state, tap)
    recorded = np.where(visible, tap.array.astype(np.float64), 0.0)
    wanted = np.where(visible, expected, 0.0)
    axes = tuple(i for i in range(recorded.ndim) if i != token_axis(op.output))
    difference = np.sqrt(np.sum((recorded - wanted) ** 2, axis=axes))
    size = np.sqrt(np.sum(wanted**2, axis=axes))
    n_layers = len({taps.parse(name).layer for _, name in computed} | {taps.parse(op.output).layer})
    allowed = segment_tolerance(op.output, n_layers) * size
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / allowed)
    token = int(np.argmax(ratio))
    worst = float(ratio[token])
    elementwise = np.abs(recorded - wanted)
    at = np.unravel_index(int(np.argmax(elementwise)), elementwise.shape)
    return _check(
        op,
        state,
        "ok" if worst <= 1 else "guilty",
        tap,
        ratio=worst if math.isfinite(worst) else None,
        n_beyond=int(np.count_nonzero(~(ratio <= 1))),
        n_ops=1 + len(computed),
        worst=_worst(op, state, tap, at, float(wanted[at]), float(allowed[token])),
        note="segment: relative L2 per token",
    )


def segment_tolerance(name: str, n_layers: int) -> float:
    """Return the relative L2 distance allowed for one token behind a segment that spans ``n_layers`` layers.

    Int8 flips inside a segment cannot be told from errors one by one; the figures are those of the end-to-end
    comparison of two right engines with independent arithmetic (``crossval.tolerance``).
    """
    kind = tap_class(name)
    factor = 1.0 if kind == "exact" else CLASSES[kind].error_factor
    return FLOOR_PER_SQRT_LAYER["independent"] * math.sqrt(n_layers) * factor * SAFETY * WORST_TOKEN


def unchecked(op: Op, state: PassState, tap: TapArray, why: str) -> OpCheck:
    """Return the check of a recorded tensor that nothing can be said about."""
    return _check(op, state, "unchecked", tap, note=why)


def _visible(op: Op, state: PassState, tap: TapArray) -> npt.NDArray[np.bool_]:
    """Scores of later tokens are masked afterwards: what an engine leaves there is its own business."""
    if op.name != "kq":
        return np.ones(tap.array.shape, np.bool_)
    rows = state.all_rows if tap.rows is None else tap.rows
    positions = np.asarray(state.plan.positions)[list(rows)]
    keys = np.arange(tap.array.shape[-1])
    return np.broadcast_to(keys <= positions[:, None], tap.array.shape)


def _invalid(op: Op, state: PassState, tap: TapArray) -> str | None:
    if tap.array.size == 0:
        return "it has no elements"
    n_rows = state.n_tokens if tap.rows is None else len(tap.rows)
    if tap.array.ndim <= token_axis(op.output) or tap.array.shape[token_axis(op.output)] != n_rows:
        return f"shape {tap.array.shape} does not hold {n_rows} tokens"
    bad = ~np.isfinite(tap.array) & _visible(op, state, tap)
    n_bad = int(np.count_nonzero(bad))
    return f"{n_bad} of {tap.array.size} values are not finite" if n_bad else None


def _worst(
    op: Op, state: PassState, tap: TapArray, at: tuple[np.intp, ...], expected: float, allowed: float
) -> Worst:
    index = [int(i) for i in at]
    row = index.pop(token_axis(op.output))
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


def _widen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array


def stack_state(values: Iterable[Value | None]) -> Value | None:
    """Concatenate the rows of one tap over all passes so far: the KV state. None when a pass lacks some."""
    parts: list[Value] = []
    for value in values:
        if value is None:
            return None
        parts.append(value)
    array = np.concatenate([part.array for part in parts]) if parts else None
    if array is None:
        return None
    computed: Covered = frozenset().union(*(part.computed for part in parts))
    return Value(array, tuple(range(array.shape[0])), computed)


def take_recorded(state: PassState, recorded: Mapping[str, TapArray], op: Op) -> TapArray | None:
    """Return the recorded output of an op and make it what later operations read."""
    tap = recorded.get(op.output)
    if tap is not None:
        state.values[op.output] = recorded_value(op.output, tap, state.n_tokens)
    return tap
