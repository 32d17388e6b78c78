"""Roundings that are missing, doubled or to the wrong format (family 12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from crossval.audit.bounds import U
from crossval.diagnose.variants.cache import SCOPES, cells_in
from crossval.diagnose.variants.context import Array, Context, Inapplicable, head, linear
from crossval.diagnose.variants.variant import EVERY_OP, Variant, on
from crossval.formats import to_bf16, to_f16
from crossval.model.kinds import rms_norm, widen
from crossval.model.taps import NORMS

ATTENTION = on("kq", "kqv_out")
HEAD = on("result_output")
ALL = "all passes"
READS_F16 = ATTENTION | HEAD


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


@dataclass(frozen=True)
class _Choice:
    """An input, what it is rounded to, and in which passes; its string is its label."""

    index: int
    change: Callable[[Array], Array]
    scope: str
    label: str

    def __format__(self, spec: str) -> str:
        return self.label


def _choices(context: Context, index: int, label: str, change: Callable[[Array], Array]) -> Iterator[_Choice]:
    """Yield the change of an input in every scope: of the cache also in some passes only."""
    for scope in SCOPES if context.op.inputs[index].endswith("_cache") else (ALL,):
        yield _Choice(index, change, scope, label.format(context.op.inputs[index].split(".")[-1]))


def _float_inputs(context: Context) -> list[int]:
    return [i for i, array in enumerate(context.raw) if array.dtype.kind == "f"]


def _f16_choices(context: Context, *, missing: bool) -> Iterator[_Choice]:
    """Yield inputs that the engine rounds to binary16, without it (``missing``); else the others, with it."""
    for index in _float_inputs(context) if context.rounded else ():
        if (context.rounded[index] == "f16") == missing:
            yield from _choices(context, index, "{}", (lambda x: x) if missing else to_f16)


def _other_formats(context: Context) -> Iterator[_Choice]:
    for index in _float_inputs(context):
        for form, change in FORMATS.items():
            if form == "Q8_0" and context.op.name not in ATTENTION:
                continue
            if form == "F16" and (context.op.name in READS_F16 or context.op.name == "inp_embd"):
                continue  # these are the roundings of bitnet.cpp itself: "missing" and "added"
            yield from _choices(context, index, f"{{}} rounded to {form}", change)


def _stored_as(context: Context, choice: _Choice) -> Array:
    """Compute with one input in another format, and not as this engine reads it."""
    return _with_input(context, choice, choice.change(widen(context.raw[choice.index])))


def _read_as(context: Context, choice: _Choice) -> Array:
    """Compute with one input in another format before this engine reads it."""
    changed = context.round(choice.index, choice.change(widen(context.raw[choice.index])))
    return _with_input(context, choice, changed)


def _with_input(context: Context, choice: _Choice, changed: Array) -> Array:
    inputs = list(context.inputs)
    if choice.scope != ALL:
        changed = cells_in(context, changed, inputs[choice.index], choice.scope)
    inputs[choice.index] = changed
    return _computed(context, inputs)


def _computed(context: Context, inputs: list[Array]) -> Array:
    if context.is_flat:
        return linear(context, x=inputs[0]) if context.is_linear else head(context, x=inputs[0])
    return context.compute(*inputs)


def _no_f16(context: Context) -> Array:
    if context.rounded.count("f16") < 2:
        raise Inapplicable
    return _computed(context, [widen(array) for array in context.raw])


def _output_as(context: Context, form: str) -> Array:
    """Round the result; where float32 noise decides the direction, follow the engine."""
    exact = context.expected
    noise = 64 * U * np.maximum(np.abs(exact), np.sqrt(np.mean(exact**2, axis=-1, keepdims=True)))
    change, target = FORMATS[form], context.target
    either = (change(exact - noise) == target) | (change(exact + noise) == target)
    return np.where(either, target, change(exact))


FORMATS_16 = ("F16", "BF16", "truncated BF16")
rounding = partial(Variant, family=12, ops=READS_F16)
# fmt: off
VARIANTS = (
    rounding("F16 rounding of {} missing", "{} is used in float32 where bitnet.cpp rounds it to binary16",
        _stored_as, partial(_f16_choices, missing=True)),
    rounding("F16 rounding missing", "no input is rounded to binary16 where bitnet.cpp does", _no_f16),
    rounding("F16 rounding of {} added", "{} is rounded to binary16 where bitnet.cpp does not",
        _stored_as, partial(_f16_choices, missing=False)),
    Variant("{}", "{} on the way in", _read_as, _other_formats, group="input rounded", family=12, ops=EVERY_OP),
    Variant("output rounded to {}", "the result is rounded to {}", _output_as,
        lambda c: FORMATS_16, group="output rounded to a 16-bit format", family=12,
        ops=EVERY_OP),
    Variant("norm weight rounded to {}", "the norm's weights are rounded to {}",
        lambda c, form: rms_norm(c.inputs[0], FORMATS[form](c.vector), eps=c.config.rms_eps),
        lambda c: FORMATS_16, group="norm weight rounded to a 16-bit format", family=12, ops=NORMS),
)
# fmt: on
