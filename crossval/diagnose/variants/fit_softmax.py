"""Scores, masks and sinks with a parameter of their own, fitted to recorded attention weights (family 9)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, close, factor, golden, number
from crossval.diagnose.variants.softmax import SOFTMAX, own_mask, right_scale, softmax
from crossval.diagnose.variants.variant import Variant

MOST_ROWS = 16
"""Tokens that a limit of the scores is fitted to."""
LEAST = 1e-6
"""Attention weights below this say too little about their scores."""


def _differences(context: Context) -> tuple[Array, Array]:
    """Return, for keys with weight, score and log weight relative to the strongest key of the same row."""
    weights, scores = context.target, context.inputs[0]
    with np.errstate(all="ignore"):
        usable = own_mask(context) & (weights > LEAST) & np.isfinite(weights)
        best = np.where(usable, weights, -1.0).argmax(axis=-1)[..., None]
        x = scores - np.take_along_axis(scores, best, axis=-1)
        y = np.log(weights) - np.log(np.take_along_axis(weights, best, axis=-1))
    usable &= usable.any(axis=-1, keepdims=True) & (np.arange(weights.shape[-1]) != best)
    if not usable.any():
        raise Inapplicable
    return x[usable], y[usable]


def _scales(context: Context) -> Iterator[Estimate]:
    """Estimate the factor of the scores from ratios of attention weights: no norm and no sink enters those."""
    x, y = _differences(context)
    scale = factor(y, x)
    if x.size >= 2 and not close(scale, (right_scale(context),), 1e-5) and abs(scale) > 1e-9:
        yield Estimate(f"{number(scale, 4)} instead of {number(right_scale(context), 4)}", scale)


def _with_scale(context: Context, fit: Estimate) -> Array:
    return softmax(context.inputs[0], own_mask(context), scale=fit.value)


def _capped(scores: Array, cap: float) -> Array:
    return cap * np.tanh(scores / cap)


def _caps(context: Context) -> Iterator[Estimate]:
    """Estimate the limit c of c·tanh(score / c), of scaled scores."""
    scores, target, visible = context.inputs[0] * right_scale(context), context.target, own_mask(context)
    if not np.isfinite(target).all():
        return
    rows = np.unique(np.linspace(0, context.n_rows - 1, MOST_ROWS).astype(int))
    scores, target, visible = scores[:, rows], target[:, rows], visible[rows]

    def distance(log_cap: float) -> float:
        return float(np.linalg.norm(softmax(_capped(scores, np.exp(log_cap)), visible, scale=1.0) - target))

    largest = float(np.abs(np.where(visible, scores, 0.0)).max())
    if largest == 0:
        return
    start = np.log(largest)
    tried = np.linspace(start - 5.0, start + 5.0, 41)
    best = tried[np.argmin([distance(x) for x in tried])]
    cap = float(np.exp(golden(distance, best - 0.25, best + 0.25)))
    if cap < 100 * largest:
        yield Estimate(number(cap, 3), cap)


def _with_cap(context: Context, fit: Estimate) -> Array:
    return softmax(_capped(context.inputs[0] * right_scale(context), fit.value), own_mask(context), scale=1.0)


def _sinks(context: Context) -> Iterator[Estimate]:
    """Estimate a further term of the sum of exponentials from how much the weights of a row lack to one."""
    scores = np.where(own_mask(context), context.inputs[0] * right_scale(context), -np.inf)
    with np.errstate(all="ignore"):
        sums = np.exp(scores).sum(axis=-1)  # (n_heads, n_rows)
        missing = 1.0 / context.target.sum(axis=-1) - 1.0
        terms = sums * missing
        weight = 1.0 / sums**2  # what float32 noise does to a row's term
        per_head = (terms * weight).sum(axis=-1) / weight.sum(axis=-1)
        overall = float((terms * weight).sum() / weight.sum())
    if not np.isfinite(per_head).all() or per_head.min() <= 1e-4 or terms.size < 2:
        return
    if overall > 0:
        yield Estimate(f"of {number(overall, 3)}", np.full(per_head.shape, overall))
    if terms.shape[1] > 1 and np.ptp(per_head) > 1e-3 * per_head.max():
        yield Estimate(f"of {', '.join(number(x, 3) for x in per_head)} for heads 0, 1, …", per_head)


def _with_sink(context: Context, fit: Estimate) -> Array:
    masked = np.where(own_mask(context), context.inputs[0] * right_scale(context), -np.inf)
    largest = masked.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        weights = np.exp(masked - largest)
        return weights / (weights.sum(axis=-1, keepdims=True) + fit.value[:, None, None] * np.exp(-largest))


def _ends(context: Context) -> tuple[Array, Array]:
    """Return the first and the last key with weight in each row that has any, relative to its own position."""
    seen = ((context.target != 0) & np.isfinite(context.target)).any(axis=0)
    if not seen.any():
        raise Inapplicable
    keys = np.arange(seen.shape[-1])
    first = np.where(seen, keys, seen.shape[-1]).min(axis=-1)
    last = np.where(seen, keys, -1).max(axis=-1)
    return first, last


def _offsets(context: Context) -> Iterator[int]:
    """Read from the weights how far beyond its own position a token sees."""
    first, last = _ends(context)
    n_kv, position = context.target.shape[-1], context.positions
    inside = (last >= 0) & (last < n_kv - 1)
    offsets = np.unique((last - position)[inside])
    if offsets.size == 1 and offsets[0] != 0 and (first[inside] == 0).all():
        yield int(offsets[0])


def _with_offset(context: Context, offset: int) -> Array:
    seen = own_mask(context, offset)
    if seen.all():
        raise Inapplicable  # a mask that is missing altogether
    return _filled(context, seen)


def _filled(context: Context, seen: Array) -> Array:
    """Softmax over the keys seen; rows that see nothing hold NaN, zeros or equal weights, as was recorded."""
    weights = softmax(context.inputs[0], seen, scale=right_scale(context))
    blind = np.broadcast_to(~seen.any(axis=-1, keepdims=True), weights.shape)
    uniform, target = 1.0 / seen.shape[-1], context.target
    with np.errstate(invalid="ignore"):
        allowed = np.isnan(target) | (target == 0) | (np.abs(target - uniform) < 1e-6 * uniform)
    return np.where(blind & allowed, target, weights)


def _windows(context: Context) -> Iterator[int]:
    """Read from the weights how many keys up to its own a token sees."""
    first, last = _ends(context)
    position = context.positions
    widths = np.unique((position - first + 1)[(first > 0) & (last == position)])
    if widths.size == 1 and (position >= widths[0]).any():
        yield int(widths[0])


def _with_window(context: Context, width: int) -> Array:
    near = np.arange(context.target.shape[-1]) > context.positions[:, None] - width
    return _filled(context, own_mask(context) & near)


def _sink_windows(context: Context) -> Iterator[Estimate]:
    """Read from the weights which first keys stay visible behind a sliding window."""
    seen = ((context.target != 0) & np.isfinite(context.target)).any(axis=0)
    hidden = own_mask(context) & ~seen
    rows = np.flatnonzero(hidden.any(axis=-1))
    if not rows.size:
        return
    starts = {int(np.flatnonzero(hidden[row])[0]) for row in rows}
    widths = {int(context.positions[row] - np.flatnonzero(hidden[row])[-1]) for row in rows}
    if len(starts) == len(widths) == 1 and min(starts) > 0 and min(widths) > 0:
        kept, width = starts.pop(), widths.pop()
        yield Estimate(f"{width} keys and the first {kept}", (kept, width))


def _with_sink_window(context: Context, fit: Estimate) -> Array:
    kept, width = fit.value
    keys = np.arange(context.target.shape[-1])
    near = (keys > context.positions[:, None] - width) | (keys < kept)
    return _filled(context, own_mask(context) & near)


def _chunks(context: Context) -> Iterator[int]:
    """Read from the weights the size of chunks within which tokens see each other."""
    first, last = _ends(context)
    position = context.positions
    if not (first > 0).any() or not (last == position).all():
        return
    size = int(np.gcd.reduce(first[first > 0]))
    if size > 1 and np.array_equal(position // size * size, first) and np.unique(position - first).size > 1:
        yield size


def _with_chunks(context: Context, size: int) -> Array:
    keys = np.arange(context.target.shape[-1])
    return _filled(context, own_mask(context) & (keys >= context.positions[:, None] // size * size))


VARIANTS = (
    Variant(
        "sliding window of {}",
        9,
        SOFTMAX,
        "tokens see the last {} keys only",
        _with_window,
        _windows,
        group="keys of earlier tokens hidden",
    ),
    Variant(
        "sliding window of {}",
        9,
        SOFTMAX,
        "tokens see the last {} only",
        _with_sink_window,
        _sink_windows,
        group="keys of earlier tokens hidden",
    ),
)
"""Beside a mask in reverse: one decoded token cannot tell them apart."""

FITTED = (
    Variant("score scale {}", 9, SOFTMAX, "scores are multiplied by {}", _with_scale, _scales),
    Variant(
        "scores capped at {}",
        9,
        SOFTMAX,
        "scaled scores x go through c·tanh(x/c) with c = {} (soft cap)",
        _with_cap,
        _caps,
        deferred=True,
    ),
    Variant(
        "attention sink {}",
        9,
        SOFTMAX,
        "the sum of exponentials has one more term {} (attention sink)",
        _with_sink,
        _sinks,
    ),
    Variant(
        "mask off by {:+d}",
        9,
        SOFTMAX,
        "the causal mask lets tokens see keys up to their own position {:+d}",
        _with_offset,
        _offsets,
    ),
    Variant(
        "attention in chunks of {}",
        9,
        SOFTMAX,
        "tokens see the keys of their own chunk of {} only",
        _with_chunks,
        _chunks,
        group="keys of earlier tokens hidden",
    ),
)
