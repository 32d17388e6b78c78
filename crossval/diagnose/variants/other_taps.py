"""Another recorded tensor in place of an input or of the output: any captured tap (family 10)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable, head
from crossval.diagnose.variants.estimate import Fit, fitted, is_off
from crossval.diagnose.variants.variant import EVERY_OP, on
from crossval.model.kinds import widen
from crossval.model.taps import BITLINEARS, NORMS

EVERY = EVERY_OP - {"inp_embd"}
READERS = EVERY - BITLINEARS - on("kq", "kqv_out", "kq_soft_max", "result_output", "pooled")
OTHER = "another tensor"
"""Group name if a tensor held and tensors read instead give the same values."""
SCREENED = 4
"""Number of tokens on which another tensor is tried before the whole pass is computed."""
ALIKE = 1e-3
"""Relative distance below which the whole pass is worth computing."""


def _others(context: Context, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yield the recorded tensors of a shape, other than the operation's own."""
    for name in context.values:
        if name in (*context.op.inputs, context.op.output):
            continue
        try:
            array = context.tap(name)
        except Inapplicable:
            continue
        if array.shape == shape:
            yield name, array


def _computed(context: Context, index: int, array: Array, rows: slice = slice(None)) -> Array:
    inputs = list(context.inputs)
    inputs[index] = array
    return context.compute(*(x[rows] for x in inputs))


def _inputs(context: Context) -> Iterator[Fit]:
    """Find recorded tensors that, read in place of an input, give the recorded output."""
    few = slice(0, SCREENED)
    target = context.target[few].reshape(min(SCREENED, context.n_rows), -1)
    for index, own in enumerate(context.inputs):
        for name, array in _others(context, own.shape) if own.dtype.kind == "f" else ():
            with np.errstate(all="ignore"):
                computed = _computed(context, index, array, few).reshape(target.shape)
            if not is_off(target, computed, ALIKE).any():
                formula = partial(_reading, index=index, name=name)
                yield Fit(f"{name} instead of {context.op.inputs[index]}", formula)


def _reading(context: Context, index: int, name: str) -> Array:
    return _computed(context, index, context.tap(name))


def _head_inputs(context: Context) -> Iterator[Fit]:
    """Yield the tensors that an LM head could have read: few have the shape of its input."""
    target = context.target[:1]
    for name, array in _others(context, context.inputs[0].shape):
        with np.errstate(all="ignore"):
            first = head(context, x=context.round(0, array)[:1])
        if not is_off(target, first, ALIKE).any():
            yield Fit(f"{name} instead of {context.op.inputs[0]}", partial(_head_reading, name=name))


def _head_reading(context: Context, name: str) -> Array:
    return head(context, x=context.round(0, context.tap(name)))


def _held(context: Context) -> Iterator[Fit]:
    """Find recorded tensors with the same values as the output."""
    if not context.recorded.any():
        return
    for name, tap in context.values.items():
        array = tap.array
        if name in (context.op.output, *context.op.inputs) or array.shape != context.recorded.shape:
            continue
        same = array == context.recorded
        if (same if context.visible is None else same | ~context.visible).all():
            yield Fit(name, partial(_holding, name=name))


def _holding(context: Context, name: str) -> Array:
    found = context.values.get(name)
    if found is None or found.array.shape != context.recorded.shape:
        raise Inapplicable
    return context.flat(widen(found.array)).copy()


# --- inputs of the pass before --------------------------------------------------------------------------------


def _before(context: Context, index: int, end: str) -> Array:
    """Return as many tokens of an input in the pass before: its first or last."""
    found = context.previous[-1].get(context.op.inputs[index]) if context.previous else None
    if found is None or found.rows is not None or found.array.shape[0] < context.n_rows:
        raise Inapplicable
    array = widen(found.array)
    return array[: context.n_rows] if end == "first" else array[-context.n_rows :]


def _stale_inputs(context: Context) -> Iterator[Fit]:
    """Find inputs that still held the values of the pass before."""
    target = context.target.reshape(context.n_rows, -1)
    for index, own in enumerate(context.inputs):
        for end in ("first", "last"):
            try:
                array = _before(context, index, end)
            except Inapplicable:
                continue
            if own.dtype.kind != "f" or array.shape != own.shape:
                continue
            with np.errstate(all="ignore"):
                computed = _computed(context, index, array).reshape(target.shape)
            if not is_off(target, computed, ALIKE).any():
                name = f"{context.op.inputs[index].split('.')[-1]} of the pass before"
                yield Fit(name, partial(_with_stale, index=index, end=end))
                break


def _with_stale(context: Context, index: int, end: str) -> Array:
    return _computed(context, index, _before(context, index, end))


# fmt: off
FITTED = (
    fitted("reads {}", "the operation reads {}", _inputs, group=OTHER, family=10, ops=READERS),
    fitted("reads {}", "the operation reads {}", _head_inputs, group=OTHER, family=10, ops=on("result_output")),
    fitted("holds the values of {}", "the tap holds the values of {}", _held, group=OTHER, family=10, ops=EVERY),
    fitted("reads {}", "the operation reads the {}: the buffer was not renewed", _stale_inputs,
        group="reads the pass before", family=11,
        ops=NORMS | on("q_rope", "k_rope", "ffn_act", "ffn_out", "ffn_inp", "l_out")),
)
# fmt: on
