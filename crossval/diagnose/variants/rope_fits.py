"""Wrong rotary position embedding whose base, positions or part the recorded values give (family 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, fitted, number
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.rope import (
    ROPE,
    factors_of,
    frequencies_of,
    kind_of,
    rotate,
    rotated,
    rotated_as,
    rotated_heads,
    rotation,
)
from crossval.model.kinds import RopePairing, split_pairs

MOST_POSITION = 4096
"""Largest position searched for."""
GRID = 4000
"""Number of bases tried before the best is refined."""
MOST_LISTED = 8
REFINEMENTS = 6
OTHER = "other positions"
"""Group name of rules that a single token cannot tell apart."""
PAIRS: dict[RopePairing, str] = {"halves": "(i, i + n / 2)", "adjacent": "(2i, 2i + 1)"}
NEAR = 1e-3
"""Positions closer than this are the same."""

# --- base and frequencies ----------------------------------------------------------------------------------------


def _pairs(x: Array, pairing: RopePairing) -> Array:
    """Return pairs as complex numbers, ``(n_rows, heads, head_dim / 2)``."""
    first, second = split_pairs(x, pairing)
    return first + 1j * second


def _turns(context: Context) -> tuple[Array, Array]:
    """Return for each token and pair the rotation recorded, as a unit complex number, and how much it weighs.

    ``(n_rows, head_dim / 2)``, joined over the heads.

    Raises:
        Inapplicable: the recorded output is not a rotation of these pairs.
    """
    pairing = context.config.rope_pairing
    before, after = _pairs(context.inputs[0], pairing), _pairs(context.target, pairing)
    product = (np.conj(before) * after).sum(axis=1)
    weight = (np.abs(before) ** 2).sum(axis=1)
    length = np.abs(product)
    if not np.isfinite(product).all() or (length == 0).any() or (np.abs(length - weight) > 1e-4 * weight).any():
        raise Inapplicable
    return product / length, weight


def _bases(context: Context) -> Iterator[Fit]:
    """Fit the base: the best of a fine grid, then refined by linear least squares of the angles."""
    turn, weight = _turns(context)
    half, position = turn.shape[-1], context.positions
    if not position.any():
        return
    i = np.arange(half) / half
    own = frequencies_of(context, 1.0)  # what scaling and factors make of every base
    row = int(np.argmax(position > 0))
    grid = np.log(np.geomspace(2.0, 1e9, GRID))
    angles = position[row] * np.exp(-grid[:, None] * i) * own
    log_base = float(grid[(np.real(turn[row] * np.exp(-1j * angles)) * weight[row]).sum(axis=-1).argmax()])
    for _ in range(REFINEMENTS):
        angle = position[:, None] * np.exp(-i * log_base) * own
        rest, slope = np.angle(turn * np.exp(-1j * angle)), -angle * i
        log_base += float((weight * slope * rest).sum() / (weight * slope**2).sum())
        if not 0 < log_base < 60:
            return
    base = float(np.exp(log_base))
    yield Fit(number(base, 4), lambda c: rotated(c, frequencies=frequencies_of(c, base)))


def _own_frequencies(context: Context) -> Iterator[Fit]:
    """Fit a frequency for each pair, from three consecutive tokens or more."""
    turn, weight = _turns(context)
    position = context.positions
    if position.size < 3 or (np.diff(position) != 1).any():
        return
    steps = (turn[1:] * np.conj(turn[:-1]) * np.minimum(weight[1:], weight[:-1])).sum(axis=0)
    frequency = np.angle(steps)
    for _ in range(REFINEMENTS):
        rest = np.angle(turn * np.exp(-1j * position[:, None] * frequency))
        square = (weight * position[:, None] ** 2).sum(axis=0)
        frequency = frequency + (weight * position[:, None] * rest).sum(axis=0) / square
    right = frequencies_of(context)
    off = np.flatnonzero(np.abs(frequency - right) * position.max() > NEAR)
    if not off.size or (np.abs(frequency[off]) * position.max() <= NEAR).all():
        return
    if (frequency > 0).all():  # of some base, or of scaled positions
        line = np.polynomial.Polynomial.fit(np.arange(right.size), np.log(frequency), 1, w=frequency)
        if (np.abs(np.exp(line(np.arange(right.size))) - frequency) * position.max() <= NEAR).all():
            return
    ratio = frequency[off] / right[off]
    if off.size > 1 and np.ptp(ratio) <= 1e-2 * np.abs(ratio).max():
        times = number(float(np.median(ratio)), 2)
    else:
        times = ", ".join(number(float(r), 2) for r in ratio[:MOST_LISTED])
    yield Fit(f"pairs {listed(off)} times {times}", lambda c: rotated(c, frequencies=frequency))


# --- positions ---------------------------------------------------------------------------------------------------


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
    frequency = frequencies_of(context)
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


def _moved(context: Context) -> Iterator[Fit]:
    """Find a constant offset of all positions."""
    found, whole = _matched_positions(context)
    offset = found - context.positions
    mean = float(offset.mean())
    if np.ptp(offset) < NEAR and abs(mean) > NEAR:
        mean = round(mean) if whole else mean
        yield Fit(f"{mean:+.4g}", _on_a_line(1.0, mean))


def _on_a_line(scale: float, offset: float) -> Callable[[Context], Array]:
    return lambda c: rotated(c, c.positions * scale + offset)


def _lines(context: Context) -> Iterator[Fit]:
    """Find a constant factor of all positions, and an offset."""
    found, _ = _matched_positions(context)
    position = context.positions
    at = position > 0
    if not at.any() or (np.ptp(found - position) < NEAR and at.sum() > 1):
        return  # an offset alone
    scale = float((found * position).sum() / (position**2).sum())
    if np.abs(found - scale * position).max() < NEAR:
        if abs(scale) > NEAR:
            yield Fit(f"times {number(scale, 4)}", _on_a_line(scale, 0.0))
    elif context.n_rows > 2:
        scale, moved = np.polyfit(position, found, 1)
        if np.abs(found - scale * position - moved).max() < NEAR and abs(scale) > NEAR:
            yield Fit(f"times {number(scale, 4)} plus {number(moved, 4)}", _on_a_line(scale, moved))


def _others(context: Context) -> Iterator[Fit]:
    """Find positions that stop growing, or restart, at a limit; otherwise list those that are wrong."""
    found, whole = _matched_positions(context)
    position, off = context.positions, found - context.positions
    if not whole or not off.any():
        return
    if context.n_rows > 1 and (np.ptp(off) == 0 or any(True for _ in _lines(context))):
        return
    limit, moved = int(found.max()), off != 0
    if context.n_rows > 1:
        if np.array_equal(found, np.minimum(position, limit)):
            yield Fit(f"that stop at {limit}", lambda c: rotated(c, np.minimum(c.positions, limit)))
            if moved.sum() > 1:
                return
        sizes = sorted({limit + 1, int(-off[moved].max())})
        size = next((n for n in sizes if n > 1 and np.array_equal(found, position % n)), None)
        if size is not None:
            yield Fit(f"modulo {size}", lambda c: rotated(c, c.positions % size))
            return
    if moved.sum() <= MOST_LISTED:
        changed = dict(zip(position[moved].tolist(), found[moved].tolist(), strict=True))
        yield Fit(
            f"{listed(found[moved].astype(int))} instead of {listed(position[moved])}",
            lambda c: rotated(c, np.array([changed.get(int(p), int(p)) for p in c.positions])),
        )


# --- part and pairing --------------------------------------------------------------------------------------------


def _changed(context: Context) -> Array:
    """Return which features of a head were changed at all."""
    size = np.abs(context.inputs[0]).max(axis=-1, keepdims=True)
    off = np.abs(context.target - context.inputs[0]) > 1e-6 * size
    if not np.isfinite(context.target).all():
        raise Inapplicable
    return off.any(axis=(0, 1))


def _parts(context: Context) -> Iterator[Fit]:
    """Determine from the output which features were rotated at all, and with which possible frequencies."""
    changed = _changed(context)
    n = changed.size
    if changed.all() or not changed.any():
        return
    first, last = int(np.flatnonzero(changed)[0]), int(np.flatnonzero(changed)[-1])
    for start, size in {(0, last + 1 + (last + 1) % 2), (first - first % 2, n - first + first % 2)}:
        if not 2 <= size < n:
            continue
        part = partial(_partly, start=start, size=size)
        words = f"{'first' if start == 0 else 'last'} {size} of {n} values"
        if size == 2:
            yield Fit(words, partial(part, length=2))
            continue
        for pairing in PAIRS:
            pairs = "" if pairing == context.config.rope_pairing else f", in pairs {PAIRS[pairing]}"
            for whose, length in (("its own", size), ("the whole head's", n)):
                formula = partial(part, length=length, pairing=pairing)
                yield Fit(f"{words}, with {whose} frequencies{pairs}", formula)


def _partly(context: Context, start: int, size: int, length: int, pairing: RopePairing | None = None) -> Array:
    kind = kind_of(context)
    if factors_of(context) is not None:
        raise Inapplicable
    frequency = kind.scale * kind.base ** (-2.0 * np.arange(size // 2) / length)
    out = context.inputs[0].copy()
    part = out[..., start : start + size]
    part[:] = rotate(part, context.positions[:, None, None] * frequency, pairing or kind.pairing)
    return out


def _slow_pairs(context: Context) -> Iterator[Fit]:
    """Determine from the output how many pairs were rotated."""
    changed = _changed(context)
    half = changed.size // 2
    turned = np.logical_or(*split_pairs(changed, context.config.rope_pairing))
    if turned.all() or not turned.any():
        return
    first, stop = int(np.flatnonzero(turned)[0]), int(np.flatnonzero(turned)[-1]) + 1
    pair = np.arange(half)
    if stop < half:
        yield Fit(f"first {stop} of {half}", lambda c: rotated(c, frequencies=frequencies_of(c) * (pair < stop)))
    if first > 0:
        slow = pair >= first
        yield Fit(f"last {half - first} of {half}", lambda c: rotated(c, frequencies=frequencies_of(c) * slow))


def _mirrored(context: Context) -> Array:
    """Rotate pairs ``(i, head_dim - 1 - i)``."""
    x = context.inputs[0]
    half = x.shape[-1] // 2
    folded = np.concatenate([x[..., :half], x[..., half:][..., ::-1]], axis=-1)
    turned = rotated_heads(context, folded, pairing="halves")
    return np.concatenate([turned[..., :half], turned[..., half:][..., ::-1]], axis=-1)


def _head_sizes(context: Context) -> Iterator[int]:
    """Yield other even head sizes into which the tensor could be divided."""
    _, n_heads, own = context.inputs[0].shape
    total = n_heads * own
    return (size for size in range(2, total, 2) if total % size == 0 and size != own)


fitted_rotation = partial(fitted, family=8, ops=ROPE)
# fmt: off
FITTED = (
    fitted_rotation("RoPE base {}", "base {} instead of the header's value", _bases, group="wrong RoPE base"),
    fitted_rotation("RoPE frequencies: {}", "the frequencies are not base^(-2i/head_dim): {}", _own_frequencies,
        group="other RoPE frequencies"),
    fitted_rotation("position {}", "positions are off by {}", _moved, group=OTHER),
    fitted_rotation("positions {}", "the positions are taken {}", _lines, group=OTHER),
    fitted_rotation("rotated by positions {}", "tokens are rotated by positions {}", _others, group=OTHER),
    fitted_rotation("rotated only the {}", "of every head only the {}, are rotated", _parts),
    fitted_rotation("rotated only the {} pairs", "of every head only the {} pairs are rotated", _slow_pairs),
    rotation("pairs from both ends", "pairs (i, head_dim - 1 - i) are rotated", _mirrored),
    rotation("written interleaved", "pairs (i, i + head_dim/2) are rotated and written to (2i, 2i + 1)",
        lambda c: rotated(c, pairing="halves", written="adjacent")),
    rotation("frequencies in reverse", "the slowest frequency comes first",
        lambda c: rotated(c, frequencies=frequencies_of(c)[::-1])),
    rotation("rotated as heads of {}",
        "the tensor is divided into heads of {} values for the rotation, with the frequencies of that size",
        rotated_as, _head_sizes),
)
# fmt: on
