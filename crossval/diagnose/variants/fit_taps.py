"""Another recorded tensor in the place of an input or of the output: any tap that was captured (family 10)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, is_off
from crossval.diagnose.variants.variant import Variant, on
from crossval.model import taps
from crossval.model.kinds import widen
from crossval.model.taps import BITLINEARS, NORMS

EVERY = frozenset({*taps.LAYER_TAPS, *taps.HEAD_TAPS})
READERS = EVERY - BITLINEARS - on("kq", "kqv_out", "kq_soft_max")
OTHER = "another tensor"
"""What is said where the tensor held and the tensors read instead give the same values."""
SCREENED = 4
"""Tokens on which another tensor is tried before the whole pass is computed."""


def _others(context: Context, shape: tuple[int, ...], taken: set[str]) -> Iterator[tuple[str, Array]]:
    """Yield the recorded tensors of a shape, other than those of the names taken."""
    for name in context.values:
        if name in taken:
            continue
        try:
            array = context.tap(name)
        except Inapplicable:
            continue
        if array.shape == shape:
            yield name, array


def _computed(context: Context, index: int, array: Array, rows: slice = slice(None)) -> Array:
    own = [context.weights[name] for name in context.op.weights]
    inputs = [array if i == index else x for i, x in enumerate(context.inputs)]
    return context.op.function(*[x[rows] for x in inputs], *own)


def _inputs(context: Context) -> Iterator[Estimate]:
    """Find recorded tensors that, read in place of an input, give what was recorded."""
    if context.is_flat:
        return
    few = slice(0, SCREENED)
    target = context.target[few].reshape(min(SCREENED, context.n_rows), -1)
    for index, own in enumerate(context.inputs):
        if own.dtype.kind != "f":
            continue
        taken = {*context.op.inputs, context.op.output}
        for name, array in _others(context, own.shape, taken):
            with np.errstate(all="ignore"):
                computed = _computed(context, index, array, few).reshape(target.shape)
            if not is_off(target, computed, 1e-3).any():
                yield Estimate(f"{name} instead of {context.op.inputs[index]}", (index, name))


def _reading(context: Context, fit: Estimate) -> Array:
    index, name = fit.value
    return _computed(context, index, context.tap(name))


def _head_inputs(context: Context) -> Iterator[Estimate]:
    """Yield the tensors that a head could have read: there are few of its input's shape."""
    from crossval.diagnose.variants.linear import head

    target = context.target
    taken = {*context.op.inputs, context.op.output}
    for name, array in _others(context, context.inputs[0].shape, taken):
        with np.errstate(all="ignore"):
            first = head(context, x=context.round(0, array)[:1])
        if not is_off(target[:1], first, 1e-3).any():
            yield Estimate(f"{name} instead of {context.op.inputs[0]}", name)


def _head_reading(context: Context, fit: Estimate) -> Array:
    from crossval.diagnose.variants.linear import head

    return head(context, x=context.round(0, context.tap(fit.value)))


# --- the output is another tensor -----------------------------------------------------------------------------


def _held(context: Context) -> Iterator[Estimate]:
    """Find recorded tensors whose values the output has."""
    if not context.recorded.any():
        return
    for name, tap in context.values.items():
        array = tap.array
        if name in (context.op.output, *context.op.inputs) or array.shape != context.recorded.shape:
            continue
        same = array == context.recorded
        if (same if context.visible is None else same | ~context.visible).all():
            yield Estimate(name, name)


def _holding(context: Context, name: Estimate) -> Array:
    found = context.values.get(name.value)
    if found is None or found.array.shape != context.recorded.shape:
        raise Inapplicable
    return context.flat(widen(found.array)).copy()


# --- inputs of the pass before --------------------------------------------------------------------------------

ENDS = ("first", "last")


def _before(context: Context, name: str, end: str) -> Array:
    """Return as many tokens of a tap in the pass before: its first or last."""
    found = context.previous[-1].get(name) if context.previous else None
    if found is None or found.rows is not None or found.array.shape[0] < context.n_rows:
        raise Inapplicable
    array = widen(found.array)
    return array[: context.n_rows] if end == "first" else array[-context.n_rows :]


def _stale_inputs(context: Context) -> Iterator[Estimate]:
    """Find inputs that still held the values of the pass before."""
    if not context.previous or context.token_axis or context.is_flat:
        return
    target = context.target.reshape(context.n_rows, -1)
    for index, own in enumerate(context.inputs):
        for end in ENDS:
            try:
                array = _before(context, context.op.inputs[index], end)
            except Inapplicable:
                continue
            if own.dtype.kind != "f" or array.shape != own.shape:
                continue
            with np.errstate(all="ignore"):
                computed = _computed(context, index, array).reshape(target.shape)
            if not is_off(target, computed, 1e-3).any():
                yield Estimate(f"{context.op.inputs[index].split('.')[-1]} of the pass before", (index, end))
                break


def _with_stale(context: Context, fit: Estimate) -> Array:
    index, end = fit.value
    return _computed(context, index, _before(context, context.op.inputs[index], end))


FITTED = (
    Variant(
        "reads {}",
        10,
        READERS - on("result_output"),
        "the operation reads {}",
        _reading,
        _inputs,
        group=OTHER,
    ),
    Variant(
        "reads {}",
        10,
        on("result_output"),
        "the operation reads {}",
        _head_reading,
        _head_inputs,
        group=OTHER,
    ),
    Variant(
        "holds the values of {}",
        10,
        EVERY,
        "the tap holds the values of {}",
        _holding,
        _held,
        group=OTHER,
    ),
    Variant(
        "reads {}",
        11,
        NORMS | on("q_rope", "k_rope", "ffn_act", "ffn_out", "ffn_inp", "l_out"),
        "the operation reads the {}: the buffer was not renewed",
        _with_stale,
        _stale_inputs,
        group="reads the pass before",
    ),
)
