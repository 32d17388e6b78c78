"""Rotary position embedding done wrong (family 8)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.linear import linear
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import rope

ROPE = on("q_rope", "k_rope")
BASES = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 1e7)


def rotate(x: Array, angle: Array, *, interleaved: bool = False, split_output: bool = False) -> Array:
    """Rotate pairs of the last axis by ``angle`` ``(n_rows, 1, head_dim / 2)``.

    Pairs are ``(i, i + head_dim/2)``, or ``(2i, 2i + 1)`` when ``interleaved``; those may be written split.
    """
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = np.cos(angle), np.sin(angle)
    turned = first * cos - second * sin, first * sin + second * cos
    if interleaved and not split_output:
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def _angle(context: Context, positions: Array | None = None, exponent: float = 1.0) -> Array:
    half = context.config.head_dim // 2
    positions = context.positions if positions is None else positions
    frequency = context.config.rope_base ** (-np.arange(half) / half * exponent)
    angle: Array = positions[:, None, None] * frequency
    return angle


def _at(context: Context, positions: Array) -> Array:
    return rotate(context.inputs[0], _angle(context, positions))


def _pass_starts(context: Context) -> Iterator[int]:
    """Yield where passes after the first start: an engine may count from there again."""
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
        return _at(c, np.full(c.n_rows, position))

    return function


def _other_bases(context: Context) -> Iterator[float]:
    return (base for base in BASES if base != context.config.rope_base)


def _half_rotated(context: Context) -> Array:
    """Rotate the first half of every head only, with the frequencies of that half."""
    part = context.config.head_dim // 2
    if part % 2:
        raise Inapplicable
    x = context.inputs[0]
    return np.concatenate(
        [rope(x[..., :part], context.positions, base=context.config.rope_base), x[..., part:]], axis=-1
    )


def _all_heads(context: Context) -> Iterator[int]:
    """Yield the size of all heads together, where there are several."""
    _, n_heads, head_dim = context.inputs[0].shape
    if n_heads > 1:
        yield n_heads * head_dim


def _across_heads(context: Context, size: int) -> Array:
    """Frequencies run over all heads, as if they were one, instead of starting again in each."""
    x = context.inputs[0]
    flat = x.reshape(x.shape[0], 1, -1)
    return rope(flat, context.positions, base=context.config.rope_base).reshape(x.shape)


def _projected(context: Context) -> Array:
    """The op's own output, rotated (of a projection, which records the tensor before it)."""
    n_heads = context.config.n_heads if context.op.name == "q" else context.config.n_kv_heads
    y = linear(context.sampled(None)).reshape(context.n_rows, n_heads, -1)
    return context.flat(rope(y, context.positions, base=context.config.rope_base))


VARIANTS = (
    Variant("not rotated", 8, ROPE, "not rotated at all", lambda c: c.inputs[0].copy()),
    Variant(
        "interleaved pairs",
        8,
        ROPE,
        "pairs (2i, 2i+1) are rotated instead of (i, i + head_dim/2)",
        lambda c: rotate(c.inputs[0], _angle(c), interleaved=True),
    ),
    Variant(
        "interleaved pairs, written split",
        8,
        ROPE,
        "pairs (2i, 2i+1) are rotated and written to (i, i + head_dim/2)",
        lambda c: rotate(c.inputs[0], _angle(c), interleaved=True, split_output=True),
    ),
    Variant(
        "RoPE base {:g}",
        8,
        ROPE,
        "base {:g} instead of the header's value",
        lambda c, base: rope(c.inputs[0], c.positions, base=base),
        _other_bases,
        group="wrong RoPE base",
    ),
    Variant(
        "position {:+d}",
        8,
        ROPE,
        "positions are off by {:+d}",
        lambda c, offset: _at(c, c.positions + offset),
        lambda c: (-2, -1, 1, 2),
        group="positions off by a constant",
    ),
    Variant(
        "positions restart after {}",
        8,
        ROPE,
        "after the first {} tokens, positions count from 0 again",
        lambda c, start: _at(c, c.positions - start),
        _pass_starts,
        group="positions restart",
    ),
    Variant(
        "position of the first token",
        8,
        ROPE,
        "all tokens of the pass are rotated by its first position",
        _constant(0),
    ),
    Variant(
        "position of the last token",
        8,
        ROPE,
        "all tokens of the pass are rotated by its last position",
        _constant(-1),
    ),
    Variant("rotated twice", 8, ROPE, "rotated twice", lambda c: _at(c, c.positions * 2)),
    Variant("rotated backwards", 8, ROPE, "rotated by the negative angle", lambda c: _at(c, -c.positions)),
    Variant(
        "positions scaled by {:g}",
        8,
        ROPE,
        "positions are multiplied by {:g} (linear RoPE scaling)",
        lambda c, factor: _at(c, c.positions * factor),
        lambda c: (0.5, 0.25, 0.125, 4.0, 8.0),
        group="scaled positions",
    ),
    Variant(
        "frequencies of twice the length",
        8,
        ROPE,
        "frequency i is base^(-i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: rotate(c.inputs[0], _angle(c, exponent=0.5)),
    ),
    Variant(
        "frequencies of half the length",
        8,
        ROPE,
        "frequency i is base^(-4i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: rotate(c.inputs[0], _angle(c, exponent=2.0)),
    ),
    Variant("half of each head rotated", 8, ROPE, "only the first half of every head is rotated", _half_rotated),
    Variant(
        "frequencies across heads",
        8,
        ROPE,
        "the frequencies run on from head to head: the tensor is rotated as one head of {} values",
        _across_heads,
        _all_heads,
        shown_sentence="the frequencies run on from head to head: the tensor is rotated as one head",
    ),
    Variant("RoPE applied to V", 8, on("v"), "values are rotated; only queries and keys should be", _projected),
    Variant(
        "already rotated",
        8,
        on("q", "k"),
        "the tensor is rotated here already, before the rotation itself",
        _projected,
    ),
)
