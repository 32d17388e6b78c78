"""Any number of levels, any rounding and any limit of the activation quantiser, found by search.

Each setting is tried on one token and some output features; what reproduces them is checked on everything.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.fit import CLOSE, MOST, Fit, probe, recorded_sums
from crossval.diagnose.variants.linear import input_scale, linear, peak, quantize
from crossval.diagnose.variants.quantizer import away, half_away
from crossval.diagnose.variants.variant import Variant
from crossval.model.taps import BITLINEARS

N_PROBED = 48
CHUNK = 64
"""Settings tried at a time."""
LEVELS = np.arange(2, 601) / 2.0
NEAR = 4e-3
"""Relative distance, on one token, below which a setting is checked: some codes may be at a rounding tie."""
INT8 = (-128.0, 127.0)
UNLIMITED = (-np.inf, np.inf)

ROUNDINGS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "": ("rounded to nearest", np.rint),
    "round half up": ("rounded to nearest, ties up", lambda p: np.floor(p + 0.5)),
    "round half away from zero": ("rounded to nearest, ties away from zero", half_away),
    "truncation": ("truncated towards zero", np.trunc),
    "rounded down": ("rounded down (floor)", np.floor),
    "rounded up": ("rounded up (ceil)", np.ceil),
    "rounded away from zero": ("rounded away from zero", away),
}


@dataclass(frozen=True)
class _Setting:
    levels: float = 127.0
    rounding: str = ""
    limits: tuple[float, float] = INT8
    back: float | None = None
    """Levels by which the sums are divided; None: the same."""


RIGHT = (_Setting(), _Setting(limits=UNLIMITED), _Setting(limits=UNLIMITED, back=127.0))


def _apply(context: Context, setting: _Setting) -> Array:
    x = context.inputs[0]
    scale = input_scale(context, x, levels=setting.levels)
    low, high = setting.limits
    codes = quantize(context, x, scale, rounding=ROUNDINGS[setting.rounding][1], low=low, high=high)
    unscale = scale if setting.back is None else input_scale(context, x, levels=setting.back)
    return linear(context, scale=scale, unscale=unscale, codes=codes)


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
        """Return the relative distance of settings from what was recorded, up to a factor, and that factor."""
        sums = (codes.astype(np.float32) @ self.rows).astype(np.float64)
        square = np.maximum(np.einsum("ij,ij->i", sums, sums), 1e-30)
        factor = sums @ self.wanted / square
        off = np.linalg.norm(self.wanted - factor[:, None] * sums, axis=-1) / self.size
        return off, factor


def _levels(context: Context) -> Iterator[Fit]:
    """Yield numbers of levels, with each rounding, that reproduce the probe."""
    at = _Probe(context)
    found: list[tuple[float, _Setting]] = []
    for name, (_, rounding) in ROUNDINGS.items():
        for first in range(0, LEVELS.size, CHUNK):
            levels = LEVELS[first : first + CHUNK]
            plain = rounding(at.x * (levels / at.largest)[:, None])
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
                            setting = _Setting(float(levels[i]), name, limited, other)
                            found.append((float(off[i]), setting))
                            break
    found.sort(key=lambda one: one[0])
    for setting in list(dict.fromkeys(setting for _, setting in found))[:MOST]:
        if setting not in RIGHT:
            yield _said(setting)


def _said(setting: _Setting) -> Fit:
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
    return Fit("; ".join(words), "; ".join(said), setting, words[0] if words else "")


def _limits(context: Context) -> Iterator[Fit]:
    """Yield limits of the codes, of both signs or of one, that reproduce the probe."""
    at = _Probe(context)
    plain = np.rint(at.x * (127.0 / at.largest))
    limit = np.arange(1.0, 127.0)
    open_ended = np.full_like(limit, 128.0)
    found: list[tuple[float, _Setting]] = []
    for low, high in ((-limit, limit), (-open_ended, limit - 1), (-limit, open_ended - 1)):
        off, factor = at.best(np.clip(plain[None], low[:, None], high[:, None]))
        good = (off < NEAR) & (np.abs(factor * 127.0 / at.largest - 1) < CLOSE)
        found += [(float(off[i]), _Setting(limits=(float(low[i]), float(high[i])))) for i in np.flatnonzero(good)]
    found.sort(key=lambda one: one[0])
    for _, setting in found[:MOST]:
        yield _said(setting)


# --- the scale of another row ---------------------------------------------------------------------------------

MOST_TOKENS = 64


def _rows_scales(context: Context) -> Iterator[Fit]:
    """Find for each token the row whose largest magnitude its scale was made from."""
    n = context.n_rows
    if n < 3 or not context.whole_pass:
        raise Inapplicable
    features = probe(context, N_PROBED)
    seen, largest = context.sampled(features), np.maximum(peak(context.inputs[0])[:, 0], 1e-5)
    wanted = recorded_sums(seen, 1.0)
    rows = context.matrix.signs[features].T
    source = np.arange(n)
    for token in range(min(n, MOST_TOKENS)):
        scales = 127.0 / largest
        sums = np.clip(np.rint(context.inputs[0][token] * scales[:, None]), *INT8).astype(np.float32) @ rows
        off = np.linalg.norm(sums / scales[:, None] - wanted[token], axis=-1)
        close = np.flatnonzero(off <= CLOSE * np.linalg.norm(wanted[token]))
        if not close.size:
            raise Inapplicable
        source[token] = token if token in close else close[np.argmin(off[close])]
    for name, words, order in _orders(n, largest):
        if (order != np.arange(n)).any() and np.array_equal(
            largest[order[:MOST_TOKENS]], largest[source[:MOST_TOKENS]]
        ):
            yield Fit(f"input scale of {name}", f"tokens are quantised with the input scale of {words}", order, "")


def _rows_back(context: Context) -> Iterator[Fit]:
    """Find for each token the row by whose scale its sums were divided."""
    n = context.n_rows
    if n < 3 or not context.whole_pass:
        raise Inapplicable
    target, expected = context.target, context.expected
    if not np.isfinite(target).all():
        raise Inapplicable
    square = np.maximum(np.einsum("ij,ij->i", expected, expected), 1e-300)
    factor = np.einsum("ij,ij->i", target, expected) / square
    if (
        np.linalg.norm(target - factor[:, None] * expected, axis=-1) > CLOSE * np.linalg.norm(target, axis=-1)
    ).any():
        raise Inapplicable
    largest = np.maximum(peak(context.inputs[0])[:, 0], 1e-5)
    for name, words, order in _orders(n, largest):
        if (order != np.arange(n)).any() and np.allclose(largest[order] / largest, factor, rtol=1e-4):
            said = f"tokens are quantised rightly, but their sums are divided by the input scale of {words}"
            yield Fit(f"sums rescaled by the input scale of {name}", said, order)


def _orders(n: int, largest: Array) -> Iterator[tuple[str, str, Array]]:
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


def _rescaled(context: Context, fit: Fit) -> Array:
    if fit.data.size != context.n_rows or not context.whole_pass:
        raise Inapplicable
    return linear(context, scale=input_scale(context, context.inputs[0])[fit.data])


def _rescaled_back(context: Context, fit: Fit) -> Array:
    if fit.data.size != context.n_rows or not context.whole_pass:
        raise Inapplicable
    return linear(context, unscale=input_scale(context, context.inputs[0])[fit.data])


FITTED = (
    Variant(
        "{0.name}",
        5,
        BITLINEARS,
        "{0.sentence}",
        lambda c, fit: _apply(c, fit.data),
        _levels,
        group="wrong number of levels",
        shown="*n* levels instead of 127; *rounding*; sums rescaled by *m*",
        shown_sentence="any number of levels from 1 to 300 in steps of a half, with any rounding, by search",
    ),
    Variant(
        "{0.name}",
        5,
        BITLINEARS,
        "{0.sentence}",
        lambda c, fit: _apply(c, fit.data),
        _limits,
        group="codes limited",
        shown="codes limited to *n*; positive codes limited to *n*; negative codes limited to *n*",
        shown_sentence="any limit of the codes, of both signs or of one, by search",
    ),
    Variant(
        "{0.name}",
        5,
        BITLINEARS,
        "{0.sentence}",
        _rescaled,
        _rows_scales,
        group="input scale of another row",
        shown="input scale of *another row*",
        shown_sentence="each token's scale is made from another row: of a group of tokens, or the largest so far",
    ),
    Variant(
        "{0.name}",
        5,
        BITLINEARS,
        "{0.sentence}",
        _rescaled_back,
        _rows_back,
        group="sums rescaled by another row's input scale",
        shown="sums rescaled by the input scale of *another row*",
        shown_sentence="each token's sums are divided by another row's scale: of a group, or the largest so far",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
