"""Roundings that are missing, doubled or to the wrong format (family 12)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from crossval.audit.bounds import U
from crossval.diagnose.variants.cache import SCOPES, cells_in
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_bf16, to_f16
from crossval.model import taps
from crossval.model.kinds import rms_norm, widen
from crossval.model.taps import NORMS

ATTENTION = on("kq", "kqv_out")
HEAD = on("result_output")
ALL = "all passes"
READS_F16 = ATTENTION | HEAD
EVERY_OP = frozenset({*taps.LAYER_TAPS, *taps.INPUT_TAPS, *taps.HEAD_TAPS})


def truncate_bf16(x: Array) -> Array:
    """Cut to bfloat16: drop the low 16 bits."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def f16_read_as_bf16(x: Array) -> Array:
    """Interpret the bits of binary16 values as bfloat16."""
    return (x.astype(np.float16).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bf16_read_as_f16(x: Array, store: Callable[[Array], Array] = to_bf16) -> Array:
    """Interpret the bits of values stored as bfloat16 (rounded or cut) as binary16."""
    bits = (store(x).astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float64)


def to_q8_0(x: Array) -> Array:
    """Round to ggml's Q8_0: int8 in blocks of 32 along the last axis, one binary16 scale each."""
    if x.shape[-1] % 32:
        raise Inapplicable
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127.0
    codes = np.rint(blocks / np.where(step == 0, 1.0, step))
    return (codes * to_f16(step)).reshape(x.shape)


FORMATS: dict[str, Callable[[Array], Array]] = {
    "F16": to_f16,
    "BF16": to_bf16,
    "truncated BF16": truncate_bf16,
    "Q8_0": to_q8_0,
}

# --- the roundings an engine states or may choose --------------------------------------------------------------


def _float_inputs(context: Context) -> list[int]:
    return [i for i, array in enumerate(context.raw) if array.dtype.kind == "f"]


def _label(context: Context, index: int) -> str:
    return context.op.inputs[index].split(".")[-1]


def _apply(context: Context, inputs: list[Array]) -> Array:
    if context.is_flat:
        from crossval.diagnose.variants.linear import head, linear

        return linear(context, x=inputs[0]) if context.is_linear else head(context, x=inputs[0])
    own = [context.weights[name] for name in context.op.weights]
    return context.op.function(*inputs, *own)


def _changed_input(context: Context, index: int, changed: Array, scope: str) -> Array:
    """Compute with one input changed; cells of the cache only where the scope says."""
    if scope != ALL:
        changed = cells_in(context, changed, context.inputs[index], scope)
    return _apply(context, [changed if i == index else array for i, array in enumerate(context.inputs)])


def _without(context: Context, choice: _Choice) -> Array:
    return _changed_input(context, choice.index, widen(context.raw[choice.index]), choice.scope)


def _with_f16(context: Context, choice: _Choice) -> Array:
    return _changed_input(context, choice.index, to_f16(widen(context.raw[choice.index])), choice.scope)


def _no_f16(context: Context) -> Array:
    if context.rounded.count("f16") < 2:
        raise Inapplicable
    return _apply(context, [widen(array) for array in context.raw])


def _input_as(context: Context, choice: _Choice) -> Array:
    rounded = FORMATS[choice.form](widen(context.raw[choice.index]))
    return _changed_input(context, choice.index, context.round(choice.index, rounded), choice.scope)


@dataclass(frozen=True)
class _Choice:
    """An input, the format it is rounded to, and in which passes; printed as its label."""

    index: int
    form: str
    scope: str
    label: str

    def __format__(self, spec: str) -> str:
        return self.label


def _scopes(context: Context, index: int) -> tuple[str, ...]:
    return SCOPES if context.op.inputs[index].endswith("_cache") else (ALL,)


def _missing(context: Context) -> Iterator[_Choice]:
    return _f16_choices(context, missing=True)


def _added(context: Context) -> Iterator[_Choice]:
    return _f16_choices(context, missing=False)


def _f16_choices(context: Context, *, missing: bool) -> Iterator[_Choice]:
    """Yield the inputs that are rounded to binary16, or are not, in every scope."""
    for index in _float_inputs(context) if context.rounded else ():
        if (context.rounded[index] == "f16") == missing:
            for scope in _scopes(context, index):
                yield _Choice(index, "F16", scope, _label(context, index))


def _choices(context: Context) -> Iterator[_Choice]:
    for index in _float_inputs(context):
        for form in FORMATS:
            if form == "Q8_0" and context.op.name not in ATTENTION:
                continue
            if form == "F16" and (context.op.name in READS_F16 or context.op.name == "inp_embd"):
                continue  # these are the roundings of bitnet.cpp itself: "missing" and "added"
            for scope in _scopes(context, index):
                yield _Choice(index, form, scope, f"{_label(context, index)} rounded to {form}")


def _output_as(context: Context, form: str) -> Array:
    """Round the result; where float32 noise decides which way, go the way the engine went."""
    exact = context.expected
    noise = 64 * U * np.maximum(np.abs(exact), np.sqrt(np.mean(exact**2, axis=-1, keepdims=True)))
    change, target = FORMATS[form], context.target
    either = (change(exact - noise) == target) | (change(exact + noise) == target)
    return np.where(either, target, change(exact))


_ROUNDINGS = (
    Variant(
        "F16 rounding of {} missing",
        12,
        READS_F16,
        "{} is used in float32 where bitnet.cpp rounds it to binary16",
        _without,
        _missing,
    ),
    Variant(
        "F16 rounding missing", 12, READS_F16, "no input is rounded to binary16 where bitnet.cpp does", _no_f16
    ),
    Variant(
        "F16 rounding of {} added",
        12,
        READS_F16,
        "{} is rounded to binary16 where bitnet.cpp does not",
        _with_f16,
        _added,
    ),
    Variant("{}", 12, EVERY_OP, "{} on the way in", _input_as, _choices, group="input rounded"),
    Variant(
        "output rounded to {}",
        12,
        EVERY_OP,
        "the result is rounded to {}",
        _output_as,
        lambda c: ("F16", "BF16", "truncated BF16"),
        group="output rounded to a 16-bit format",
    ),
)

# --- weights --------------------------------------------------------------------------------------------------


def _norm_weight(context: Context, form: str) -> Array:
    return rms_norm(context.inputs[0], FORMATS[form](context.vector), eps=context.config.rms_eps)


_WEIGHTS = (
    Variant(
        "norm weight rounded to {}",
        12,
        NORMS,
        "the norm's weights are rounded to {}",
        _norm_weight,
        lambda c: ("F16", "BF16", "truncated BF16"),
        group="norm weight rounded to a 16-bit format",
    ),
)

VARIANTS = (*_ROUNDINGS, *_WEIGHTS)
