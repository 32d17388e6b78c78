"""Rotary position embedding done wrong: pairs, base, frequencies, positions, also fitted (family 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable, linear
from crossval.diagnose.variants.estimate import Fit, fitted, number
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import Rope, RopePairing, join_pairs, rope, rope_frequencies, split_pairs

ROPE = on("q_rope", "k_rope")
BASES = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 1e7)
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


def rotate(x: Array, angle: Array, pairing: RopePairing, written: RopePairing | None = None) -> Array:
    """Rotate pairs of the last axis by ``angle`` ``(n_rows, 1, head_dim / 2)``.

    ``written``: where the pairs are written, if not to where they were read.
    """
    first, second = split_pairs(x, pairing)
    cos, sin = np.cos(angle), np.sin(angle)
    return join_pairs(first * cos - second * sin, first * sin + second * cos, written or pairing)


def _kind(context: Context) -> Rope:
    """Return the model's rotation, of any operation."""
    config = context.config
    return Rope(config.rope_base, config.rope_pairing, config.rope_scale)


def _factors(context: Context) -> Array | None:
    """Return the model's divisors of angles; None: it has none."""
    return context.array("rope_freqs.weight") if context.config.rope_factors else None


def _frequencies(context: Context, base: float | None = None, exponent: float = 1.0) -> Array:
    kind = _kind(context)
    base = (kind.base if base is None else base) ** exponent
    return rope_frequencies(context.config.head_dim, _factors(context), base=base, scale=kind.scale)


def _rotated(
    context: Context,
    positions: Array | None = None,
    frequencies: Array | None = None,
    pairing: RopePairing | None = None,
    written: RopePairing | None = None,
) -> Array:
    """Rotate by positions or frequencies, or in pairs, other than the correct ones."""
    positions = context.positions if positions is None else positions
    frequencies = _frequencies(context) if frequencies is None else frequencies
    angle = positions[:, None, None] * frequencies
    return rotate(context.inputs[0], angle, pairing or context.config.rope_pairing, written)


def _in_other_pairs(context: Context, pairing: RopePairing) -> Array:
    if context.config.rope_pairing == pairing:
        raise Inapplicable
    return _rotated(context, pairing=pairing)


def _with_factors(change: Callable[[Array], Array]) -> Callable[[Context], Array]:
    """Return the rotation with other divisors of angles than the model's."""

    def function(context: Context) -> Array:
        factors = _factors(context)
        if factors is None:
            raise Inapplicable
        return _rotated(context, frequencies=_frequencies(context) * factors / change(factors))

    return function


def _with_scale(change: Callable[[float], float]) -> Callable[[Context], Array]:
    """Return the rotation with another linear scaling than the model's."""

    def function(context: Context) -> Array:
        scale = context.config.rope_scale
        if scale == 1:
            raise Inapplicable
        return _rotated(context, context.positions * (change(scale) / scale))

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
        return _rotated(c, np.full(c.n_rows, position))

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
    kind, factors = _kind(context), _factors(context)
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


def _rotated_as(context: Context, head_dim: int) -> Array:
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
        lambda c: _rotated(c, pairing="adjacent", written="halves")),
    rotation("frequency factors skipped", "the angles are not divided by rope_freqs.weight",
        _with_factors(np.ones_like)),
    rotation("frequency factors multiplied", "the angles are multiplied by rope_freqs.weight instead of divided",
        _with_factors(lambda factors: 1.0 / factors)),
    rotation("linear scaling skipped", "positions are not divided by the header's rope.scaling.factor",
        _with_scale(lambda scale: 1.0)),
    rotation("linear scaling inverted", "positions are multiplied by the header's rope.scaling.factor",
        _with_scale(lambda scale: 1.0 / scale)),
    rotation("RoPE base {:g}", "base {:g} instead of the header's value",
        lambda c, base: _rotated(c, frequencies=_frequencies(c, base)), _other_bases, group="wrong RoPE base"),
    rotation("position {:+d}", "positions are off by {:+d}", lambda c, offset: _rotated(c, c.positions + offset),
        lambda c: (-2, -1, 1, 2), group="positions off by a constant"),
    rotation("positions restart after {}", "after the first {} tokens, positions count from 0 again",
        lambda c, start: _rotated(c, c.positions - start), _pass_starts, group="positions restart"),
    rotation("position of the first token", "all tokens of the pass are rotated by its first position",
        _constant(0)),
    rotation("position of the last token", "all tokens of the pass are rotated by its last position",
        _constant(-1)),
    rotation("rotated twice", "rotated twice", lambda c: _rotated(c, c.positions * 2)),
    rotation("rotated backwards", "rotated by the negative angle", lambda c: _rotated(c, -c.positions)),
    rotation("positions scaled by {:g}", "positions are multiplied by {:g} (linear RoPE scaling)",
        lambda c, factor: _rotated(c, c.positions * factor), _other_scales,
        group="scaled positions"),
    rotation("frequencies of twice the length",
        "frequency i is base^(-i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: _rotated(c, frequencies=_frequencies(c, exponent=0.5))),
    rotation("frequencies of half the length",
        "frequency i is base^(-4i/head_dim) instead of base^(-2i/head_dim)",
        lambda c: _rotated(c, frequencies=_frequencies(c, exponent=2.0))),
    rotation("half of each head rotated", "only the first half of every head is rotated", _half_rotated),
    rotation("frequencies across heads",
        "the frequencies run on from head to head: the tensor is rotated as one head of {} values",
        _rotated_as, _all_heads,
        shown_sentence="the frequencies run on from head to head: the tensor is rotated as one head"),
    Variant("RoPE applied to V", "values are rotated; only queries and keys should be", _projected, family=8,
        ops=on("v")),
    Variant("already rotated", "the tensor is rotated here already, before the rotation itself", _projected,
        family=8, ops=on("q", "k")),
)
# fmt: on

# --- fitted: base and frequencies -----------------------------------------------------------------------------


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
    own = _frequencies(context, 1.0)  # what scaling and factors make of every base
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
    yield Fit(number(base, 4), lambda c: _rotated(c, frequencies=_frequencies(c, base)))


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
        times = number(float(np.median(ratio)), 2)
    else:
        times = ", ".join(number(float(r), 2) for r in ratio[:MOST_LISTED])
    yield Fit(f"pairs {listed(off)} times {times}", lambda c: _rotated(c, frequencies=frequency))


# --- fitted: positions ----------------------------------------------------------------------------------------


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


def _moved(context: Context) -> Iterator[Fit]:
    """Find a constant offset of all positions."""
    found, whole = _matched_positions(context)
    offset = found - context.positions
    mean = float(offset.mean())
    if np.ptp(offset) < NEAR and abs(mean) > NEAR:
        mean = round(mean) if whole else mean
        yield Fit(f"{mean:+.4g}", _on_a_line(1.0, mean))


def _on_a_line(scale: float, offset: float) -> Callable[[Context], Array]:
    return lambda c: _rotated(c, c.positions * scale + offset)


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
            yield Fit(f"that stop at {limit}", lambda c: _rotated(c, np.minimum(c.positions, limit)))
            if moved.sum() > 1:
                return
        sizes = sorted({limit + 1, int(-off[moved].max())})
        size = next((n for n in sizes if n > 1 and np.array_equal(found, position % n)), None)
        if size is not None:
            yield Fit(f"modulo {size}", lambda c: _rotated(c, c.positions % size))
            return
    if moved.sum() <= MOST_LISTED:
        changed = dict(zip(position[moved].tolist(), found[moved].tolist(), strict=True))
        yield Fit(
            f"{listed(found[moved].astype(int))} instead of {listed(position[moved])}",
            lambda c: _rotated(c, np.array([changed.get(int(p), int(p)) for p in c.positions])),
        )


# --- fitted: part and pairing ---------------------------------------------------------------------------------


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
    kind = _kind(context)
    if _factors(context) is not None:
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
        yield Fit(f"first {stop} of {half}", lambda c: _rotated(c, frequencies=_frequencies(c) * (pair < stop)))
    if first > 0:
        slow = pair >= first
        yield Fit(f"last {half - first} of {half}", lambda c: _rotated(c, frequencies=_frequencies(c) * slow))


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
        lambda c: _rotated(c, pairing="halves", written="adjacent")),
    rotation("frequencies in reverse", "the slowest frequency comes first",
        lambda c: _rotated(c, frequencies=_frequencies(c)[::-1])),
    rotation("rotated as heads of {}",
        "the tensor is divided into heads of {} values for the rotation, with the frequencies of that size",
        _rotated_as, _head_sizes),
)
# fmt: on
