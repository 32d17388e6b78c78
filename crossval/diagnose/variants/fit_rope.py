"""Rotations with a parameter of their own: base, offset, scale, positions, part and pairing, fitted (family 8)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, number
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.rope import ROPE, rotate
from crossval.diagnose.variants.variant import Variant

MOST_POSITION = 4096
"""Largest position that is looked for."""
GRID = 4000
"""Bases tried before the best is refined."""
MOST_LISTED = 8
REFINEMENTS = 6
OTHER = "other positions"
"""What rules are called that a single token cannot tell apart."""
NEAR = 1e-3
"""Positions nearer than this are the same."""


def _pairs(x: Array) -> Array:
    """Return pairs ``(i, i + head_dim/2)`` as complex numbers, ``(n_rows, heads, head_dim / 2)``."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def _turns(context: Context) -> tuple[Array, Array]:
    """Return for each token and pair the rotation recorded, as a unit complex number, and how much it weighs.

    ``(n_rows, head_dim / 2)``, joined over the heads.

    Raises:
        Inapplicable: what was recorded is no rotation of these pairs.
    """
    before, after = _pairs(context.inputs[0]), _pairs(context.target)
    product = (np.conj(before) * after).sum(axis=1)
    weight = (np.abs(before) ** 2).sum(axis=1)
    length = np.abs(product)
    if not np.isfinite(product).all() or (length == 0).any() or (np.abs(length - weight) > 1e-4 * weight).any():
        raise Inapplicable
    return product / length, weight


def _frequencies(context: Context, base: float | None = None) -> Array:
    half = context.config.head_dim // 2
    return (context.config.rope_base if base is None else base) ** (-np.arange(half) / half)


# --- base -----------------------------------------------------------------------------------------------------


def _bases(context: Context) -> Iterator[Estimate]:
    """Fit the base: the best of a fine grid, then refined by linear least squares of the angles."""
    turn, weight = _turns(context)
    half, position = turn.shape[-1], context.positions
    if not position.any():
        return
    i = np.arange(half) / half
    row = int(np.argmax(position > 0))
    grid = np.log(np.geomspace(2.0, 1e9, GRID))
    angles = position[row] * np.exp(-grid[:, None] * i)
    log_base = float(grid[(np.real(turn[row] * np.exp(-1j * angles)) * weight[row]).sum(axis=-1).argmax()])
    for _ in range(REFINEMENTS):
        angle = position[:, None] * np.exp(-i * log_base)
        rest, slope = np.angle(turn * np.exp(-1j * angle)), -angle * i
        log_base += float((weight * slope * rest).sum() / (weight * slope**2).sum())
        if not 0 < log_base < 60:
            return
    base = float(np.exp(log_base))
    yield Estimate(number(base, 4), base)


def _with_base(context: Context, base: Estimate) -> Array:
    return rotate(context.inputs[0], context.positions[:, None, None] * _frequencies(context, base.value))


def _own_frequencies(context: Context) -> Iterator[Estimate]:
    """Fit a frequency for each pair, from three tokens in a row or more."""
    turn, weight = _turns(context)
    position = context.positions
    if position.size < 3 or (np.diff(position) != 1).any():
        return
    steps = (turn[1:] * np.conj(turn[:-1]) * np.minimum(weight[1:], weight[:-1])).sum(axis=0)
    frequency = np.angle(steps)
    for _ in range(REFINEMENTS):
        rest = np.angle(turn * np.exp(-1j * position[:, None] * frequency))
        frequency = frequency + (weight * position[:, None] * rest).sum(axis=0) / (
            weight * position[:, None] ** 2
        ).sum(axis=0)
    right = _frequencies(context)
    off = np.flatnonzero(np.abs(frequency - right) * position.max() > NEAR)
    if not off.size or (np.abs(frequency[off]) * position.max() <= NEAR).all():
        return
    if (frequency > 0).all():  # of some base, or of scaled positions
        line = np.polynomial.Polynomial.fit(np.arange(right.size), np.log(frequency), 1, w=frequency)
        if (np.abs(np.exp(line(np.arange(right.size))) - frequency) * position.max() <= NEAR).all():
            return
    ratio = frequency[off] / right[off]
    if off.size > 1 and np.ptp(ratio) <= 1e-2 * np.abs(ratio).max():
        words = f"pairs {listed(off)} times {number(float(np.median(ratio)), 2)}"
    else:
        words = f"pairs {listed(off)} times {', '.join(number(float(r), 2) for r in ratio[:MOST_LISTED])}"
    yield Estimate(words, frequency)


def _with_frequencies(context: Context, fitted: Estimate) -> Array:
    return rotate(context.inputs[0], context.positions[:, None, None] * fitted.value)


# --- positions ------------------------------------------------------------------------------------------------


def _matched_positions(context: Context) -> tuple[Array, bool]:
    """Return the position that each token was rotated by, and whether all are whole numbers.

    Raises:
        Inapplicable: with these frequencies none gives what was recorded.
    """
    found = context.once("positions matched", _match_positions)
    if found is None:
        raise Inapplicable
    return found


def _match_positions(context: Context) -> tuple[Array, bool] | None:
    turn, weight = _turns(context)
    frequency = _frequencies(context)
    n = min(MOST_POSITION, max(context.config.context_length, int(context.positions.max()) + 1))
    tried = np.arange(-64 if n > 64 else -n, n, 0.25 if n <= 512 else 0.5)
    wave = np.exp(-1j * tried[:, None] * frequency)
    found = tried[np.real(wave @ (turn * weight).T).argmax(axis=0)]
    for _ in range(REFINEMENTS):
        rest = np.angle(turn * np.exp(-1j * found[:, None] * frequency))
        found = found + (weight * frequency * rest).sum(axis=-1) / (weight * frequency**2).sum(axis=-1)
    if np.abs(np.angle(turn * np.exp(-1j * found[:, None] * frequency))).max() > NEAR:
        return None
    whole = np.rint(found)
    return (whole, True) if np.abs(found - whole).max() < NEAR else (found, False)


def _rule(context: Context, kind: str, *numbers: float) -> Array:
    """Return the positions that a rule makes of the right ones."""
    position = context.positions
    if kind == "line":
        return position * numbers[0] + numbers[1]
    if kind == "limit":
        return np.minimum(position, numbers[0])
    if kind == "modulus":
        return position % int(numbers[0])
    changed = dict(zip(numbers[::2], numbers[1::2], strict=True))
    return np.array([changed.get(int(p), int(p)) for p in position])


def _ruled(context: Context, rule: Estimate) -> Array:
    positions = _rule(context, *rule.value)
    return rotate(context.inputs[0], positions[:, None, None] * _frequencies(context))


def _moved(context: Context) -> Iterator[Estimate]:
    """Find a constant offset of all positions."""
    found, whole = _matched_positions(context)
    offset = found - context.positions
    mean = float(offset.mean())
    if np.ptp(offset) < NEAR and abs(mean) > NEAR:
        mean = round(mean) if whole else mean
        yield Estimate(f"{mean:+.4g}", ("line", 1.0, mean))


def _lines(context: Context) -> Iterator[Estimate]:
    """Find a constant factor of all positions, and an offset."""
    found, _ = _matched_positions(context)
    position = context.positions
    at = position > 0
    if not at.any() or (np.ptp(found - position) < NEAR and at.sum() > 1):
        return  # an offset alone
    scale = float((found * position).sum() / (position**2).sum())
    if np.abs(found - scale * position).max() < NEAR:
        if abs(scale) > NEAR:
            yield Estimate(f"times {number(scale, 4)}", ("line", scale, 0.0))
    elif context.n_rows > 2:
        scale, moved = np.polyfit(position, found, 1)
        if np.abs(found - scale * position - moved).max() < NEAR and abs(scale) > NEAR:
            yield Estimate(f"times {number(scale, 4)} plus {number(moved, 4)}", ("line", scale, moved))


def _others(context: Context) -> Iterator[Estimate]:
    """Find positions that stop growing, or start again, at a limit; else list those that are wrong."""
    found, whole = _matched_positions(context)
    position, off = context.positions, found - context.positions
    if not whole or not off.any():
        return
    if context.n_rows > 1 and (np.ptp(off) == 0 or any(True for _ in _lines(context))):
        return
    limit, moved = int(found.max()), off != 0
    sizes = {limit + 1, int(-off[moved].max())}
    if context.n_rows > 1 and np.array_equal(found, np.minimum(position, limit)):
        yield Estimate(f"that stop at {limit}", ("limit", limit))
        if moved.sum() > 1:
            return
    for size in sorted(
        size for size in sizes if size > 1 and context.n_rows > 1 and np.array_equal(found, position % size)
    ):
        yield Estimate(f"modulo {size}", ("modulus", size))
        return
    if moved.sum() <= MOST_LISTED:
        pairs = zip(position[moved].tolist(), found[moved].tolist(), strict=True)
        words = f"{listed(found[moved].astype(int))} instead of {listed(position[moved])}"
        yield Estimate(words, ("list", *(number for pair in pairs for number in pair)))


# --- part and pairing -----------------------------------------------------------------------------------------


def _changed(context: Context) -> Array:
    """Return which features of a head were changed at all."""
    size = np.abs(context.inputs[0]).max(axis=-1, keepdims=True)
    off = np.abs(context.target - context.inputs[0]) > 1e-6 * size
    if not np.isfinite(context.target).all():
        raise Inapplicable
    return off.any(axis=(0, 1))


def _parts(context: Context) -> Iterator[Estimate]:
    """Read from the output which features were rotated at all, and with which frequencies that can be."""
    changed = _changed(context)
    n = changed.size
    if changed.all() or not changed.any():
        return
    first, last = int(np.flatnonzero(changed)[0]), int(np.flatnonzero(changed)[-1])
    for start, size in {(0, last + 1 + (last + 1) % 2), (first - first % 2, n - first + first % 2)}:
        if not 2 <= size < n:
            continue
        where = "first" if start == 0 else "last"
        if size == 2:
            yield Estimate(f"{where} 2 of {n} values", (start, 2, 2, False))
            continue
        for pairs, interleaved in (("", False), (", in pairs (2i, 2i + 1)", True)):
            for whose, length in (("its own", size), ("the whole head's", n)):
                words = f"{where} {size} of {n} values, with {whose} frequencies{pairs}"
                yield Estimate(words, (start, size, length, interleaved))


def _partly(context: Context, fit: Estimate) -> Array:
    start, size, length, interleaved = fit.value
    x = context.inputs[0]
    frequency = context.config.rope_base ** (-2.0 * np.arange(size // 2) / length)
    out = x.copy()
    part = slice(start, start + size)
    out[..., part] = rotate(x[..., part], context.positions[:, None, None] * frequency, interleaved=interleaved)
    return out


def _slow_pairs(context: Context) -> Iterator[Estimate]:
    """Read from the output how many pairs ``(i, i + head_dim/2)`` were rotated."""
    changed = _changed(context)
    half = changed.size // 2
    turned = changed[:half] | changed[half:]
    if turned.all() or not turned.any():
        return
    last = int(np.flatnonzero(turned)[-1])
    if last + 1 < half:
        yield Estimate(f"first {last + 1} of {half}", (0, last + 1))
    first = int(np.flatnonzero(turned)[0])
    if first > 0:
        yield Estimate(f"last {half - first} of {half}", (first, half))


def _some_pairs(context: Context, fit: Estimate) -> Array:
    first, last = fit.value
    half = context.config.head_dim // 2
    frequency = _frequencies(context) * ((np.arange(half) >= first) & (np.arange(half) < last))
    return rotate(context.inputs[0], context.positions[:, None, None] * frequency)


def _mirrored(context: Context) -> Array:
    """Rotate pairs ``(i, head_dim - 1 - i)``."""
    x = context.inputs[0]
    half = x.shape[-1] // 2
    folded = np.concatenate([x[..., :half], x[..., half:][..., ::-1]], axis=-1)
    turned = rotate(folded, _angles(context))
    return np.concatenate([turned[..., :half], turned[..., half:][..., ::-1]], axis=-1)


def _angles(context: Context) -> Array:
    return context.positions[:, None, None] * _frequencies(context)


def _split_to_interleaved(context: Context) -> Array:
    """Rotate pairs ``(i, i + head_dim/2)``, write them to ``(2i, 2i + 1)``."""
    turned = rotate(context.inputs[0], _angles(context))
    half = turned.shape[-1] // 2
    return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(turned.shape)


FITTED = (
    Variant(
        "RoPE base {}",
        8,
        ROPE,
        "base {} instead of the header's value",
        _with_base,
        _bases,
        group="wrong RoPE base",
    ),
    Variant(
        "RoPE frequencies: {}",
        8,
        ROPE,
        "the frequencies are not base^(-2i/head_dim): {}",
        _with_frequencies,
        _own_frequencies,
        group="other RoPE frequencies",
    ),
    Variant("position {}", 8, ROPE, "positions are off by {}", _ruled, _moved, group=OTHER),
    Variant("positions {}", 8, ROPE, "the positions are taken {}", _ruled, _lines, group=OTHER),
    Variant(
        "rotated by positions {}", 8, ROPE, "tokens are rotated by positions {}", _ruled, _others, group=OTHER
    ),
    Variant("rotated only the {}", 8, ROPE, "of every head only the {}, are rotated", _partly, _parts),
    Variant(
        "rotated only the {} pairs",
        8,
        ROPE,
        "of every head only the {} pairs are rotated",
        _some_pairs,
        _slow_pairs,
    ),
    Variant("pairs from both ends", 8, ROPE, "pairs (i, head_dim - 1 - i) are rotated", _mirrored),
    Variant(
        "written interleaved",
        8,
        ROPE,
        "pairs (i, i + head_dim/2) are rotated and written to (2i, 2i + 1)",
        _split_to_interleaved,
    ),
    Variant(
        "frequencies in reverse",
        8,
        ROPE,
        "the slowest frequency comes first",
        lambda c: rotate(c.inputs[0], _angles(c)[..., ::-1]),
    ),
)
