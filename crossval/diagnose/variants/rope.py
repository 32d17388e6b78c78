"""Rotary position embedding done wrong: pairs, base, frequencies, positions (family 8); fitted: ``rope_fits``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable, linear
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import Rope, RopePairing, join_pairs, rope, rope_frequencies, split_pairs

ROPE = on("q_rope", "k_rope")
BASES = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 1e7)


def rotate(x: Array, angle: Array, pairing: RopePairing, written: RopePairing | None = None) -> Array:
    """Rotate pairs of the last axis by ``angle`` ``(n_rows, 1, head_dim / 2)``.

    ``written``: where the pairs are written, if not to where they were read.
    """
    first, second = split_pairs(x, pairing)
    cos, sin = np.cos(angle), np.sin(angle)
    return join_pairs(first * cos - second * sin, first * sin + second * cos, written or pairing)


def kind_of(context: Context) -> Rope:
    """Return the model's rotation, of any operation."""
    config = context.config
    return Rope(config.rope_base, config.rope_pairing, config.rope_scale)


def factors_of(context: Context) -> Array | None:
    """Return the model's divisors of angles; None: it has none."""
    return context.array("rope_freqs.weight") if context.config.rope_factors else None


def frequencies_of(context: Context, base: float | None = None, exponent: float = 1.0) -> Array:
    """Return the angle per position of each pair, ``(head_dim / 2,)``, also of another base or a power of it."""
    kind = kind_of(context)
    base = (kind.base if base is None else base) ** exponent
    return rope_frequencies(context.config.head_dim, factors_of(context), base=base, scale=kind.scale)


def rotated(
    context: Context,
    positions: Array | None = None,
    frequencies: Array | None = None,
    pairing: RopePairing | None = None,
    written: RopePairing | None = None,
) -> Array:
    """Rotate the input by positions or frequencies, or in pairs, other than the correct ones."""
    positions = context.positions if positions is None else positions
    frequencies = frequencies_of(context) if frequencies is None else frequencies
    angle = positions[:, None, None] * frequencies
    return rotate(context.inputs[0], angle, pairing or context.config.rope_pairing, written)


def _in_other_pairs(context: Context, pairing: RopePairing) -> Array:
    if context.config.rope_pairing == pairing:
        raise Inapplicable
    return rotated(context, pairing=pairing)


def _with_factors(change: Callable[[Array], Array]) -> Callable[[Context], Array]:
    """Return the rotation with other divisors of angles than the model's."""

    def function(context: Context) -> Array:
        factors = factors_of(context)
        if factors is None:
            raise Inapplicable
        return rotated(context, frequencies=frequencies_of(context) * factors / change(factors))

    return function


def _with_scale(change: Callable[[float], float]) -> Callable[[Context], Array]:
    """Return the rotation with another linear scaling than the model's."""

    def function(context: Context) -> Array:
        scale = context.config.rope_scale
        if scale == 1:
            raise Inapplicable
        return rotated(context, context.positions * (change(scale) / scale))

    return function


def _pass_starts(context: Context) -> Iterator[int]:
    """Yield the starts of passes after the first: an engine may count from 0 again there."""
    start = 0
    for taken in context.previous:
        earlier = taken.get(context.op.output)
        if earlier is None or earlier.rows is not None:
            break
        start += earlier.array.shape[0]
        if start < context.start:
            yield start
    if context.start > 0:
        yield context.start


def _constant(row: int) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        position = c.plan.positions[row]
        if c.n_tokens == 1 or position == 0:  # by position 0: not rotated, which has a name of its own
            raise Inapplicable
        return rotated(c, np.full(c.n_rows, position))

    return function


def _other_bases(context: Context) -> Iterator[float]:
    return (base for base in BASES if base != context.config.rope_base)


def _other_scales(context: Context) -> Iterator[float]:
    """Yield common factors of positions that are not the model's own scaling, skipped or inverted."""
    own = context.config.rope_scale
    return (factor for factor in (0.5, 0.25, 0.125, 4.0, 8.0) if factor not in (1 / own, 1 / own**2))


def _half_rotated(context: Context) -> Array:
    """Rotate the first half of every head only, with the frequencies of that half."""
    part = context.config.head_dim // 2
    if part % 2:
        raise Inapplicable
    x = context.inputs[0]
    return np.concatenate([rotated_heads(context, x[..., :part]), x[..., part:]], axis=-1)


def rotated_heads(
    context: Context, x: Array, positions: Array | None = None, pairing: RopePairing | None = None
) -> Array:
    """Rotate heads of any size as the model does; divisors of angles fit the model's own size only.

    ``positions``: other ones than those of the operation's tokens.
    """
    kind, factors = kind_of(context), factors_of(context)
    if factors is not None and x.shape[-1] != context.config.head_dim:
        raise Inapplicable
    pairing = pairing or kind.pairing
    positions = context.positions if positions is None else positions
    return rope(x, positions, factors, base=kind.base, pairing=pairing, scale=kind.scale)


def _all_heads(context: Context) -> Iterator[int]:
    """Yield the size of all heads together, where there are several."""
    _, n_heads, head_dim = context.inputs[0].shape
    if n_heads > 1:
        yield n_heads * head_dim


def rotated_as(context: Context, head_dim: int) -> Array:
    """Divide the tensor into heads of another size; as one head, frequencies run over all of them."""
    x = context.inputs[0]
    return rotated_heads(context, x.reshape(x.shape[0], -1, head_dim)).reshape(x.shape)


def _projected(context: Context) -> Array:
    """The op's own output, rotated (of a projection, which records the tensor before it)."""
    n_heads = context.config.n_heads if context.op.name == "q" else context.config.n_kv_heads
    y = linear(context.sampled(None)).reshape(context.n_rows, n_heads, -1)
    return context.flat(rotated_heads(context, y))


rotation = partial(Variant, family=8, ops=ROPE)
# fmt: off
VARIANTS = (
    rotation("not rotated", "not rotated at all", lambda c: c.inputs[0].copy()),
    rotation("interleaved pairs", "pairs (2i, 2i+1) are rotated instead of (i, i + head_dim/2)",
        lambda c: _in_other_pairs(c, "adjacent")),
    rotation("pairs of halves", "pairs (i, i + head_dim/2) are rotated instead of (2i, 2i+1)",
        lambda c: _in_other_pairs(c, "halves")),
    rotation("interleaved pairs, written split",
        "pairs (2i, 2i+1) are rotated and written to (i, i + head_dim/2)",
        lambda c: rotated(c, pairing="adjacent", written="halves")),
    rotation("frequency factors skipped", "the angles are not divided by rope_freqs.weight",
        _with_factors(np.ones_like)),
    rotation("frequency factors multiplied", "the angles are multiplied by rope_freqs.weight instead of divided",
        _with_factors(lambda factors: 1.0 / factors)),
    rotation("linear scaling skipped", "positions are not divided by the header's rope.scaling.factor",
        _with_scale(lambda scale: 1.0)),
    rotation("linear scaling inverted", "positions are multiplied by the header's rope.scaling.factor",
        _with_scale(lambda scale: 1.0 / scale)),
    rotation("RoPE base {:g}", "base {:g} instead of the header's value",
        lambda c, base: rotated(c, frequencies=frequencies_of(c, base)), _other_bases, group="wrong RoPE base"),
    rotation("position {:+d}", "positions are off by {:+d}", lambda c, offset: rotated(c, c.positions + offset),
        lambda c: (-2, -1, 1, 2), group="positions off by a constant"),
    rotation("positions restart after {}", "after the first {} tokens, positions count from 0 again",
        lambda c, start: rotated(c, c.positions - start), _pass_starts, group="positions restart"),
    rotation("position of the first token", "all tokens of the pass are rotated by its first position",
        _constant(0)),
    rotation("position of the last token", "all tokens of the pass are rotated by its last position",
        _constant(-1)),
    rotation("rotated twice", "rotated twice", lambda c: rotated(c, c.positions * 2)),
    rotation("rotated backwards", "rotated by the negative angle", lambda c: rotated(c, -c.positions)),
    rotation("positions scaled by {:g}", "positions are multiplied by {:g} (linear RoPE scaling)",
        lambda c, factor: rotated(c, c.positions * factor), _other_scales,
        group="scaled positions"),
    rotation("frequencies of twice the length",
        "frequency i is base^(-i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: rotated(c, frequencies=frequencies_of(c, exponent=0.5))),
    rotation("frequencies of half the length",
        "frequency i is base^(-4i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: rotated(c, frequencies=frequencies_of(c, exponent=2.0))),
    rotation("half of each head rotated", "only the first half of every head is rotated", _half_rotated),
    rotation("frequencies across heads",
        "the frequencies run on from head to head: the tensor is rotated as one head of {} values",
        rotated_as, _all_heads,
        shown_sentence="the frequencies run on from head to head: the tensor is rotated as one head"),
    Variant("RoPE applied to V", "values are rotated; only queries and keys should be", _projected, family=8,
        ops=on("v")),
    Variant("already rotated", "the tensor is rotated here already, before the rotation itself", _projected,
        family=8, ops=on("q", "k")),
)
# fmt: on
