"""The int8 activation quantiser of BitLinear done wrong, with parameters that are found by search (family 5).

Each setting is tried on one token and some output features; settings that reproduce these are checked on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import (
    Array,
    Context,
    Inapplicable,
    half_away,
    input_scale,
    linear,
    peak,
    quantize,
    scaled,
)
from crossval.diagnose.variants.estimate import CLOSE, MOST, Fit, fitted, probe, recorded_sums
from crossval.diagnose.variants.variant import Variant
from crossval.formats import to_bf16, to_f16
from crossval.model.taps import BITLINEARS

N_PROBED = 48
CHUNK = 64
"""Number of settings tried together."""
LEVELS = np.arange(2, 601) / 2.0
NEAR = 4e-3
"""Relative distance, on one token, below which a setting is checked: some codes may be at a rounding tie."""
MOST_TOKENS = 64
INT8 = (-128.0, 127.0)
UNLIMITED = (-np.inf, np.inf)

# --- levels, rounding and limits ------------------------------------------------------------------------------


def away(x: Array) -> Array:
    """Round away from zero."""
    return np.copysign(np.ceil(np.abs(x)), x)


ROUNDINGS: dict[str, tuple[str, Callable[[Array], Array] | None]] = {
    "": ("rounded to nearest", None),
    "round half up": ("rounded to nearest, ties up", lambda p: np.floor(p + 0.5)),
    "round half away from zero": ("rounded to nearest, ties away from zero", half_away),
    "truncation": ("truncated towards zero", np.trunc),
    "rounded down": ("rounded down (floor)", np.floor),
    "rounded up": ("rounded up (ceil)", np.ceil),
    "rounded away from zero": ("rounded away from zero", away),
}


@dataclass(frozen=True)
class Setting:
    """How activations become integers."""

    levels: float = 127.0
    rounding: str = ""
    limits: tuple[float, float] = INT8
    back: float | None = None
    """Levels by which the sums are divided; None: the same."""


RIGHT = (Setting(), Setting(limits=UNLIMITED), Setting(limits=UNLIMITED, back=127.0))


def integers(context: Context, setting: Setting) -> tuple[Array, Array]:
    """Return the codes of the input and the scale of each token."""
    x = context.inputs[0]
    scale = input_scale(context, x, levels=setting.levels)
    low, high = setting.limits
    return quantize(context, x, scale, rounding=ROUNDINGS[setting.rounding][1], low=low, high=high), scale


def _with(context: Context, setting: Setting) -> Array:
    codes, scale = integers(context, setting)
    unscale = scale if setting.back is None else input_scale(context, context.inputs[0], levels=setting.back)
    return linear(context, scale=scale, unscale=unscale, codes=codes)


def _wrapped(context: Context) -> Array:
    """Scale by 128 and let +128 wrap to -128."""
    scale = input_scale(context, context.inputs[0], levels=128.0)
    codes = np.rint(scaled(context, context.inputs[0], scale))
    return linear(context, scale=scale, codes=np.where(codes > 127, codes - 256, codes).astype(np.float32))


def _rounded(name: str, instead: str) -> Variant:
    return quantizer(name, instead, lambda c: _with(c, Setting(rounding=name)))


# --- the scale of each token ----------------------------------------------------------------------------------


def _scale(context: Context, largest: Array | None = None) -> Array:
    return input_scale(context, context.inputs[0], largest=largest)


def _per_tensor(context: Context) -> Array:
    whole = context.inputs[0]
    if not context.whole_pass:
        whole = context.tap(context.op.inputs[0], range(context.n_tokens))
    if whole.shape[0] == 1:
        raise Inapplicable
    return linear(context, scale=_scale(context, np.full((context.n_rows, 1), np.abs(whole).max())))


def _row_order(context: Context, which: str) -> Array:
    if not context.whole_pass or context.n_rows == 1:
        raise Inapplicable
    rows, last = np.arange(context.n_rows), context.n_rows - 1
    return {
        "first": np.zeros_like(rows),
        "last": np.full_like(rows, last),
        "previous": np.maximum(rows - 1, 0),
        "next": np.minimum(rows + 1, last),
    }[which]


def _float_row_sums(context: Context) -> Array:
    """Subtract the sum of the float activations, not of their codes, from codes 0, 1, 2 times int8."""
    codes, scale = context.quantized
    x = context.inputs[0]
    off = codes.astype(np.float64).sum(axis=-1, keepdims=True) / scale - x.sum(axis=-1, keepdims=True)
    if not off.any():
        raise Inapplicable
    return context.expected + off * context.matrix.scale


def _zero_rows(context: Context) -> Array:
    zero = ~context.inputs[0].any(axis=-1)
    if not zero.any():
        raise Inapplicable
    out = context.expected.copy()
    out[zero] = np.nan
    return out


def _halves_to_even(context: Context) -> Array:
    if context.quantizer != "main":
        raise Inapplicable
    scale = input_scale(context, context.inputs[0])
    return linear(context, scale=scale, codes=quantize(context, context.inputs[0], scale, rounding=np.rint))


ROWS = ("first", "previous", "next", "last")
OTHER_ROW = "input scale of another row"
BACK = "sums rescaled by another row's input scale"
quantizer = partial(Variant, family=5, ops=BITLINEARS)
# fmt: off
VARIANTS = (
    quantizer("input scale 1.0",
        "activations are rounded to integers without being scaled (input scale hard-coded to 1.0)",
        lambda c: linear(c, scale=1.0)),
    quantizer("input scale 127", "activations are scaled by 127 as if every row's largest magnitude were 1",
        lambda c: linear(c, scale=127.0)),
    quantizer("input scale not undone", "the sums are not divided by the input scale",
        lambda c: linear(c, unscale=1.0)),
    quantizer("input scale undone twice", "the sums are divided by the input scale twice",
        lambda c: linear(c, unscale=_scale(c) ** 2)),
    quantizer("input scale undone without 127",
        "the sums are multiplied by the row's largest magnitude but not divided by 127",
        lambda c: linear(c, unscale=1.0 / np.maximum(peak(c.inputs[0]), 1e-5))),
    quantizer("per-tensor absmax", "one input scale for all tokens of the pass instead of one per token",
        _per_tensor),
    quantizer("input scale of the {} row", "tokens are quantised with the input scale of the {} row",
        lambda c, which: linear(c, scale=_scale(c)[_row_order(c, which)]), lambda c: ROWS, group=OTHER_ROW),
    quantizer("sums rescaled by the {} row's input scale",
        "tokens are quantised correctly, but their sums are divided by the input scale of the {} row",
        lambda c, which: linear(c, unscale=_scale(c)[_row_order(c, which)]), lambda c: ROWS, group=BACK),
    quantizer("mean magnitude instead of absmax",
        "the input scale is taken from the mean magnitude of the row instead of the largest",
        lambda c: linear(c, scale=_scale(c, np.mean(np.abs(c.inputs[0]), axis=-1, keepdims=True)))),
    quantizer("{:g} levels instead of 127", "activations are quantised to {:g} levels per sign instead of 127",
        lambda c, levels: _with(c, Setting(levels, limits=(-levels, min(levels, 127.0)))),
        lambda c: (128.0, 7.0, 8.0, 63.0, 64.0, 126.0, 255.0), group="wrong number of levels"),
    _rounded("round half up", "ties are rounded up instead of to even"),
    _rounded("round half away from zero", "ties are rounded away from zero instead of to even"),
    quantizer("round half to even", "ties are rounded to even; the stated arithmetic rounds them away from zero",
        _halves_to_even),
    _rounded("truncation", "scaled activations are truncated towards zero instead of rounded"),
    _rounded("rounded down", "scaled activations are rounded down (floor) instead of to nearest"),
    _rounded("rounded up", "scaled activations are rounded up (ceil) instead of to nearest"),
    _rounded("rounded away from zero", "scaled activations are rounded away from zero instead of to nearest"),
    quantizer("scaled by 128 with wrap-around",
        "activations are scaled by 128 and the largest one wraps to -128", _wrapped,
        group="wrong number of levels"),
    quantizer("no activation quantisation", "activations stay floating-point; they are not quantised to int8",
        lambda c: linear(c, codes=c.inputs[0], scale=1.0)),
    quantizer("no activation quantisation (F16)",
        "activations are rounded to binary16 instead of quantised to int8",
        lambda c: linear(c, codes=to_f16(c.inputs[0]), scale=1.0)),
    quantizer("no activation quantisation (BF16)",
        "activations are rounded to bfloat16 instead of quantised to int8",
        lambda c: linear(c, codes=to_bf16(c.inputs[0]), scale=1.0)),
    quantizer("activation sum in floating point",
        "the sum that makes up for codes 0, 1, 2 is that of the float activations instead of their int8 codes",
        _float_row_sums),
    quantizer("all-zero activation row",
        "an all-zero activation row has no largest magnitude: its scale is 127/0 (or 0 instead), and bringing its "
        "sums, all 0, back to size is 0 times infinity, NaN instead of 0",
        _zero_rows),
)
# fmt: on

# --- searched: levels, rounding and limits --------------------------------------------------------------------


class _Probe:
    """One token and some output features, on which many settings are tried."""

    def __init__(self, context: Context) -> None:
        far = np.linalg.norm(context.target_by_token - context.by_token(context.expected), axis=-1)
        token = int(np.argmax(far))
        features = probe(context, N_PROBED)
        self.x = context.inputs[0][token]
        self.largest = max(float(np.abs(self.x).max()), 1e-5)
        seen = context.of_tokens(np.arange(context.n_rows) == token).sampled(features)
        self.wanted = recorded_sums(seen, 1.0)[0]
        self.size = float(np.linalg.norm(self.wanted))
        self.rows = context.matrix.signs[features].T
        if not self.size:
            raise Inapplicable

    def best(self, codes: Array) -> tuple[Array, Array]:
        """Return the relative distance of settings from the recorded values, up to a factor, and that factor."""
        sums = (codes.astype(np.float32) @ self.rows).astype(np.float64)
        square = np.maximum(np.einsum("ij,ij->i", sums, sums), 1e-30)
        factor = sums @ self.wanted / square
        off = np.linalg.norm(self.wanted - factor[:, None] * sums, axis=-1) / self.size
        return off, factor


def _any_levels(context: Context) -> Iterator[Fit]:
    """Yield numbers of levels, with each rounding, that reproduce the probe."""
    at = _Probe(context)
    found: list[tuple[float, Setting]] = []
    for name, (_, rounding) in ROUNDINGS.items():
        for first in range(0, LEVELS.size, CHUNK):
            levels = LEVELS[first : first + CHUNK]
            plain = (rounding or np.rint)(at.x * (levels / at.largest)[:, None])
            for limits in (INT8, UNLIMITED):
                if limits is UNLIMITED and levels[-1] <= INT8[1]:
                    continue
                off, factor = at.best(np.clip(plain, *limits))
                for i in np.flatnonzero(off < NEAR):
                    back = factor[i] * levels[i] / at.largest  # 1: what was multiplied is divided by
                    for other in (None, 127.0, 128.0):
                        ratio = 1.0 if other is None else levels[i] / other
                        if abs(back - ratio) <= CLOSE * ratio:
                            limited = UNLIMITED if levels[i] <= INT8[1] else limits
                            setting = Setting(float(levels[i]), name, limited, other)
                            found.append((float(off[i]), setting))
                            break
    found.sort(key=lambda one: one[0])
    for setting in list(dict.fromkeys(setting for _, setting in found))[:MOST]:
        if setting not in RIGHT:
            yield _said(setting)


def _said(setting: Setting) -> Fit:
    words, said = [], []
    if setting.levels != 127.0:
        words.append(f"{setting.levels:g} levels instead of 127")
        said.append(f"activations are quantised to {setting.levels:g} levels per sign instead of 127")
        if setting.levels > INT8[1] and setting.limits == UNLIMITED:
            words.append("not limited to int8")
            said.append("the codes are not limited to int8")
    if setting.rounding:
        words.append(setting.rounding)
        said.append(f"scaled activations are {ROUNDINGS[setting.rounding][0]}")
    if setting.back is not None and setting.back != setting.levels:
        words.append(f"sums rescaled by {setting.back:g}")
        said.append(f"the sums are rescaled as if there were {setting.back:g} levels")
    low, high = setting.limits
    if setting.levels == 127.0 and (low, high) not in (INT8, UNLIMITED):
        limit = {
            -low: f"codes limited to {high:g}",
            127.0: f"positive codes limited to {high:g}" if low < -127 else f"negative codes limited to {low:g}",
        }.get(high, f"positive codes limited to {high:g}")
        words.append(limit)
        said.append(f"{limit} in magnitude" if -low == high else limit)
    return Fit("; ".join(words), lambda c: _with(c, setting), "; ".join(said))


def _limits(context: Context) -> Iterator[Fit]:
    """Yield limits of the codes, of both signs or of one, that reproduce the probe."""
    at = _Probe(context)
    plain = np.rint(at.x * (127.0 / at.largest))
    limit = np.arange(1.0, 127.0)
    open_ended = np.full_like(limit, 128.0)
    found: list[tuple[float, Setting]] = []
    for low, high in ((-limit, limit), (-open_ended, limit - 1), (-limit, open_ended - 1)):
        off, factor = at.best(np.clip(plain[None], low[:, None], high[:, None]))
        good = (off < NEAR) & (np.abs(factor * 127.0 / at.largest - 1) < CLOSE)
        found += [(float(off[i]), Setting(limits=(float(low[i]), float(high[i])))) for i in np.flatnonzero(good)]
    found.sort(key=lambda one: one[0])
    for _, setting in found[:MOST]:
        yield _said(setting)


# --- searched: the scale of another row -----------------------------------------------------------------------


def _rows_scales(context: Context) -> Iterator[Fit]:
    """Find for each token the row whose largest magnitude gave its scale."""
    n = context.n_rows
    if n < 3 or not context.whole_pass:
        raise Inapplicable
    features = probe(context, N_PROBED)
    seen, largest = context.sampled(features), np.maximum(peak(context.inputs[0])[:, 0], 1e-5)
    wanted = recorded_sums(seen, 1.0)
    rows = context.matrix.signs[features].T
    source = np.arange(min(n, MOST_TOKENS))
    for token in source.copy():
        scales = 127.0 / largest
        sums = np.clip(np.rint(context.inputs[0][token] * scales[:, None]), *INT8).astype(np.float32) @ rows
        off = np.linalg.norm(sums / scales[:, None] - wanted[token], axis=-1)
        close = np.flatnonzero(off <= CLOSE * np.linalg.norm(wanted[token]))
        if not close.size:
            raise Inapplicable
        source[token] = token if token in close else close[np.argmin(off[close])]
    for name, words, order in _orders(n, largest):
        if np.array_equal(largest[order[:MOST_TOKENS]], largest[source]):
            said = f"tokens are quantised with the input scale of {words}"
            yield Fit(f"input scale of {name}", partial(_of_rows, order, False), said)


def _rows_back(context: Context) -> Iterator[Fit]:
    """Find for each token the row by whose scale its sums were divided."""
    n = context.n_rows
    if n < 3 or not context.whole_pass:
        raise Inapplicable
    target, expected = context.target, context.expected
    if not np.isfinite(target).all():
        raise Inapplicable
    if context.bias is not None:
        target, expected = target - context.bias, expected - context.bias
    square = np.maximum(np.einsum("ij,ij->i", expected, expected), 1e-300)
    factor = np.einsum("ij,ij->i", target, expected) / square
    off = np.linalg.norm(target - factor[:, None] * expected, axis=-1)
    if (off > CLOSE * np.linalg.norm(target, axis=-1)).any():
        raise Inapplicable
    largest = np.maximum(peak(context.inputs[0])[:, 0], 1e-5)
    for name, words, order in _orders(n, largest):
        if np.allclose(largest[order] / largest, factor, rtol=1e-4):
            said = f"tokens are quantised correctly, but their sums are divided by the input scale of {words}"
            yield Fit(f"sums rescaled by the input scale of {name}", partial(_of_rows, order, True), said)


def _of_rows(order: Array, back: bool, context: Context) -> Array:
    """Quantise, or divide the sums, by the scales of other rows."""
    if order.size != context.n_rows or not context.whole_pass:
        raise Inapplicable
    scales = _scale(context)[order]
    return linear(context, unscale=scales) if back else linear(context, scale=scales)


def _orders(n: int, largest: Array) -> Iterator[tuple[str, str, Array]]:
    """Yield the rows, other than each token's own, whose scales kernels have been seen to use."""
    at = np.arange(n)
    for name, words, order in _all_orders(n, largest):
        if (order != at).any():
            yield name, words, order


def _all_orders(n: int, largest: Array) -> Iterator[tuple[str, str, Array]]:
    at = np.arange(n)
    yield (
        "the largest row so far",
        "the largest row of the pass so far",
        np.asarray([int(np.argmax(largest[: i + 1])) for i in at]),
    )
    for group in (2, 4, 8, 16, 32):
        if group >= n:
            return
        start = at - at % group
        stop = np.minimum(start + group, n)
        name = f"{group} tokens"
        yield f"the first of {name}", f"the first token of each group of {group}", start
        yield f"the last of {name}", f"the last token of each group of {group}", stop - 1
        tops = [int(a + np.argmax(largest[a:b])) for a, b in zip(start, stop, strict=True)]
        yield f"the largest of {name}", f"the largest row of each group of {group} tokens", np.asarray(tops)


fit = partial(fitted, "{}", "{0.sentence}", family=5, ops=BITLINEARS)
# fmt: off
FITTED = (
    fit(_any_levels, group="wrong number of levels",
        shown="*n* levels instead of 127; *rounding*; sums rescaled by *m*",
        shown_sentence="any number of levels from 1 to 300 in steps of a half, with any rounding, by search"),
    fit(_limits, group="codes limited",
        shown="codes limited to *n*; positive codes limited to *n*; negative codes limited to *n*",
        shown_sentence="any limit of the codes, of both signs or of one, by search"),
    fit(_rows_scales, group=OTHER_ROW, shown="input scale of *another row*",
        shown_sentence="each token's scale is made from another row: of a group of tokens, or the largest so far"),
    fit(_rows_back, group=BACK, shown="sums rescaled by the input scale of *another row*",
        shown_sentence="each token's sums are divided by another row's scale: of a group, or the largest so far"),
)
# fmt: on
"""Tried when nothing simpler explains a matrix product."""
