"""Any table of codes, under any layout and any way to quantise: least squares on the three classes of codes.

With S_k the sum of the int8 activations whose weight has code k, every engine that gives the codes the values
a, b, c records ``(a S_0 + b S_1 + c S_2) / scale * weight scale``: three unknowns against all recorded values.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from crossval.diagnose.variants import layouts
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.fit import CLOSE, Fit, distance, probe, recorded_sums, settled, snapped
from crossval.diagnose.variants.linear import input_scale, linear, quantize
from crossval.diagnose.variants.quantizer import half_away
from crossval.diagnose.variants.variant import Variant
from crossval.diagnose.variants.weights import read_through
from crossval.model.kinds import FloatArray
from crossval.model.taps import BITLINEARS

N_PROBED = 96
LEAST = 16
"""Values that three unknowns have to explain at least."""
TERNARY = (-1.0, 0.0, 1.0)
LIKE_SIGNS = 1e-5
"""A table this near to a multiple of -1, 0, +1 is a scale, not a table."""


@dataclass(frozen=True)
class Quantised:
    """A way to make integers of the activations that is tried together with misread weights."""

    name: str
    """Empty: the right one."""
    sentence: str
    levels: float = 127.0
    rounding: Callable[[Array], Array] = np.rint
    whole: bool = True

    def codes(self, context: Context) -> tuple[Array, Array]:
        """Return codes and the scale of each token."""
        x = context.inputs[0]
        scale = input_scale(context, x, levels=self.levels)
        if not self.whole:
            return x, np.ones_like(scale)
        return quantize(context, x, scale, rounding=self.rounding), scale


RIGHT = Quantised("", "")
MODES = (
    RIGHT,
    Quantised("truncation", "activations are truncated towards zero", rounding=np.trunc),
    Quantised("rounded down", "activations are rounded down (floor)", rounding=np.floor),
    Quantised("rounded up", "activations are rounded up (ceil)", rounding=np.ceil),
    Quantised("round half away from zero", "ties are rounded away from zero", rounding=half_away),
    Quantised("128 levels instead of 127", "activations are scaled to 128 levels per sign", levels=128.0),
    Quantised("no activation quantisation", "activations stay floating-point", whole=False),
)


@dataclass(frozen=True)
class _Read:
    layout: layouts.Layout
    table: tuple[float, ...]
    mode: Quantised
    factor: float


def _fits(context: Context) -> Iterator[Fit]:
    """Fit the table under every layout and way to quantise; yield those that reproduce the sums looked at."""
    features = probe(context, N_PROBED)
    seen = settled(context.sampled(features))
    matrix, options = context.matrix, _distinct(seen)
    wanted = [recorded_sums(seen, scale) for _, _, scale in options]
    for layout in layouts.layouts(matrix.signs.shape[1]):
        try:
            codes = layout.codes_of(matrix, features)
        except ValueError:
            continue
        low, high = ((codes == k).astype(np.float32) for k in (0, 2))
        for (mode, x, _), sums in zip(options, wanted, strict=True):
            if (found := _fitted(x, low, high, sums)) is not None:
                read = _named(layout, found, mode, matrix.scale)
                if read is not None:
                    yield read


def _distinct(context: Context) -> list[tuple[Quantised, Array, Array]]:
    """Return the ways to quantise that give other codes than the right one on this input."""
    made = [(mode, *mode.codes(context)) for mode in MODES]
    return [one for one in made if one[0] is RIGHT or not np.array_equal(one[1], made[0][1])]


def _fitted(x: Array, low: Array, high: Array, sums: FloatArray) -> FloatArray | None:
    """Return the values of codes 0, 1, 2 that come closest to the sums; None: far from them."""
    first, last = ((x @ mask.T.astype(x.dtype)).astype(np.float64) for mask in (low, high))
    middle = x.astype(np.float64).sum(axis=-1, keepdims=True) - first - last
    size = np.sqrt(np.mean(sums**2, axis=-1, keepdims=True))
    if not size.all() or sums.size < LEAST:
        return None
    terms = np.stack([(one / size).reshape(-1) for one in (first, middle, last)], axis=-1)
    wanted = (sums / size).reshape(-1)
    solution, _, rank, _ = np.linalg.lstsq(terms, wanted, rcond=None)
    if rank < 3 or distance(wanted, terms @ solution) > CLOSE:
        return None
    return solution


def _named(layout: layouts.Layout, values: FloatArray, mode: Quantised, scale: float) -> Fit | None:
    factor = float(values[2] - values[0]) / 2
    table: tuple[float, ...] = tuple(map(snapped, map(float, values)))
    scaled = ""
    if np.allclose(values, factor * np.asarray(TERNARY), atol=2e-4 * max(1.0, abs(factor))):
        if abs(factor - 1) > 2e-4:
            scaled = _scale_name(factor, scale)
            if not scaled:
                return None  # some factor: which of the scales is wrong cannot be told
        else:
            factor = 1.0
        table = TERNARY
    else:
        factor = 1.0
    if table[0] == table[1] == table[2]:
        return _blind(layout, table, mode)
    words = [layout.name] if layout.name else []
    said = [layout.sentence] if layout.name else []
    if table != TERNARY:
        name, sentence = table_words(table)
        words.append(name)
        said.append(sentence)
    for name, sentence in ((scaled, scaled), (mode.name, mode.sentence)):
        if name:
            words.append(name)
            said.append(sentence)
    if len(words) < 2 and table == TERNARY and layout not in layouts.OTHERS:
        return None  # nothing, or one mistake that has a variant of its own
    return Fit("; ".join(words), "; ".join(said), _Read(layout, table, mode, factor), words[0])


def _blind(layout: layouts.Layout, table: tuple[float, ...], mode: Quantised) -> Fit | None:
    """The weights do not count: any layout would do."""
    if layout is not layouts.RIGHT or mode is not RIGHT:
        return None
    return Fit(
        f"{table[0]:g} times the activation sum",
        f"every output is {table[0]:g} times the sum of the activations: all codes are read alike, or the sum "
        "over the codes is lost and only its correction is left",
        _Read(layout, table, mode, 1.0),
    )


def table_words(table: tuple[float, ...]) -> tuple[str, str]:
    """Return the name and the sentence of a table of codes."""
    said = ", ".join(f"{v:g}" if v <= 0 else f"+{v:g}" for v in table)
    offset = table[1]
    name, sentence = f"code table {said}", f"the 2-bit codes 0, 1, 2 stand for {said} instead of -1, 0, +1"
    if np.allclose(np.asarray(table) - offset, TERNARY, atol=LIKE_SIGNS):
        times = 1 - offset
        often = {2.0: "twice", 0.0: "not at all"}.get(times, f"{times:g} times")
        name += f" (activation sum subtracted {often})"
        sentence += f": the sum of the activations is subtracted {often} instead of once"
    return name, sentence


def _scale_name(factor: float, scale: float) -> str:
    known = {"weight scale ignored": 1 / scale, "weight scale applied twice": scale}
    return next((name for name, value in known.items() if abs(factor - value) <= 1e-4 * value), "")


def _computed(context: Context, fit: Fit) -> Array:
    read: _Read = fit.data
    codes, scale = read.mode.codes(context)
    rows_of = read_through(read.layout.codes_of, (*read.table, 0.0))
    return read.factor * linear(context, codes=codes, scale=scale, rows_of=rows_of)


def _row_sums(context: Context) -> Array:
    """Subtract the sum of the float activations, not of their codes, from codes 0, 1, 2 times int8."""
    codes, scale = context.quantized
    x = context.inputs[0]
    off = codes.astype(np.float64).sum(axis=-1, keepdims=True) / scale - x.sum(axis=-1, keepdims=True)
    if not off.any():
        raise Inapplicable
    return context.expected + off * context.matrix.scale


ROW_SUMS = Variant(
    "activation sum in floating point",
    5,
    BITLINEARS,
    "the sum that makes up for codes 0, 1, 2 is that of the float activations instead of their int8 codes",
    _row_sums,
)
FITTED = (
    Variant(
        "{0.name}",
        2,
        BITLINEARS,
        "{0.sentence}",
        _computed,
        _fits,
        group="{0.group}",
        shown="*layout*; code table *a*, *b*, *c*; *weight scale*; *quantisation*",
        shown_sentence="any values of the three codes by least squares, under any layout, scale and quantisation",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
