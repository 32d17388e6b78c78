"""Scale, mask and softmax of attention scores done wrong, with parameters that are fitted (family 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, close, factor, fitted, log_minimum, number
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import Softmax

SOFTMAX = on("kq_soft_max")
MOST_ROWS = 16
"""Number of tokens to which a limit of the scores is fitted."""
LEAST = 1e-6
"""Attention weights below this determine their scores too poorly."""


def _right_scale(context: Context) -> float:
    kind = context.op.kind
    if not isinstance(kind, Softmax):
        raise Inapplicable
    return kind.scale


def _scaled(context: Context) -> Array:
    return context.inputs[0] * _right_scale(context)


def _mask(context: Context, offset: int = 0) -> Array:
    """Return which keys each token sees, ``(n_rows, n_kv)``; with ``offset`` 1 it also sees the next one."""
    return context.mask(context.target.shape[-1], offset)


def _keys(context: Context) -> Array:
    return np.arange(context.target.shape[-1])


def softmax(scores: Array, visible: Array, axis: int = -1) -> Array:
    """Return the softmax of the visible scores; where nothing is visible, NaN."""
    masked = np.where(visible, scores, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights = np.exp(masked - masked.max(axis=axis, keepdims=True))
        return weights / weights.sum(axis=axis, keepdims=True)


def _scaled_by(scale_of: Callable[[Context], float]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        if scale_of(c) == _right_scale(c):
            raise Inapplicable
        return softmax(c.inputs[0] * scale_of(c), _mask(c))

    return function


def _again(context: Context) -> Array:
    if _right_scale(context) != 1.0:
        raise Inapplicable
    return softmax(context.inputs[0] / np.sqrt(context.config.head_dim), _mask(context))


def _over_axis(axis: int) -> Callable[[Context], Array]:
    """Softmax over heads or queries; where no query sees a key the weights are zero."""

    def function(c: Context) -> Array:
        if c.inputs[0].shape[axis] == 1:
            raise Inapplicable
        visible = np.broadcast_to(_mask(c), c.inputs[0].shape)
        return np.where(visible, np.nan_to_num(softmax(_scaled(c), visible, axis)), 0.0)

    return function


def _masked(visible: Callable[[Context], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        seen = visible(c)
        if np.array_equal(seen, _mask(c)):
            raise Inapplicable
        return softmax(_scaled(c), seen)

    return function


def _blind(fill: Callable[[int], float]) -> Callable[[Context], Array]:
    """A token does not see itself; ``fill``: weights of the first, which sees nothing, for this many keys."""

    def function(c: Context) -> Array:
        seen = _mask(c, -1)
        return np.where(seen.any(axis=-1, keepdims=True), softmax(_scaled(c), seen), fill(seen.shape[-1]))

    return function


def _late_mask(context: Context) -> Array:
    everything = np.ones_like(_mask(context))
    if np.array_equal(everything, _mask(context)):
        raise Inapplicable
    return np.where(_mask(context), softmax(_scaled(context), everything), 0.0)


def _unnormed(context: Context) -> Array:
    masked = np.where(_mask(context), _scaled(context), -np.inf)
    return np.exp(masked - masked.max(axis=-1, keepdims=True))


def _off_by_one_softmax(context: Context) -> Array:
    masked = np.where(_mask(context), _scaled(context), -np.inf)
    largest = np.maximum(masked.max(axis=-1, keepdims=True), 0.0)
    weights = np.exp(masked - largest)
    return weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest))


def _sigmoid(context: Context) -> Array:
    with np.errstate(over="ignore"):
        return np.where(_mask(context), 1.0 / (1.0 + np.exp(-_scaled(context))), 0.0)


_BLIND = "mask off by one: a token does not see itself"

attention = partial(Variant, family=9, ops=SOFTMAX)
# fmt: off
VARIANTS = (
    attention("no scale", "scores are not multiplied by 1/sqrt(head_dim)", _scaled_by(lambda c: 1.0)),
    attention("scale 1/head_dim", "scores are divided by head_dim (scaled twice) instead of by its root",
        _scaled_by(lambda c: 1.0 / c.config.head_dim)),
    attention("scale sqrt(head_dim)", "scores are multiplied by sqrt(head_dim) instead of divided",
        _scaled_by(lambda c: float(np.sqrt(c.config.head_dim)))),
    attention("scale 1/sqrt(dim)", "scores are divided by the root of dim instead of head_dim",
        _scaled_by(lambda c: float(1.0 / np.sqrt(c.config.dim)))),
    attention("scale 1/sqrt(n_heads)", "scores are divided by the root of n_heads instead of head_dim",
        _scaled_by(lambda c: float(1.0 / np.sqrt(c.config.n_heads)))),
    attention("scaled again", "scores are multiplied by 1/sqrt(head_dim), as the queries were already", _again),
    attention("base 2 instead of e", "powers of 2 instead of e (a factor log2(e) is missing)",
        _scaled_by(lambda c: float(np.log(2.0) * _right_scale(c)))),
    attention("softmax over queries", "normed over the queries instead of the keys", _over_axis(1)),
    attention("softmax over heads", "normed over the heads instead of the keys", _over_axis(0)),
    attention("mask missing", "no causal mask: tokens see the future",
        _masked(lambda c: np.ones_like(_mask(c)))),
    attention("mask off by one: a token sees the next", "the causal mask lets every token see the one after it",
        _masked(lambda c: _mask(c, 1))),
    attention("mask off by one: a token does not see itself (NaN)",
        "the causal mask hides a token from itself; the first row, fully masked, is NaN",
        _blind(lambda n_kv: np.nan), group=_BLIND),
    attention("mask off by one: a token does not see itself (first row uniform)",
        "the causal mask hides a token from itself; the first row, fully masked, is uniform",
        _blind(lambda n_kv: 1.0 / n_kv), group=_BLIND),
    attention("mask off by one: a token does not see itself (first row zero)",
        "the causal mask hides a token from itself; the first row, fully masked, is zero",
        _blind(lambda n_kv: 0.0), group=_BLIND),
    attention("mask in reverse", "tokens see themselves and the future instead of the past",
        _masked(lambda c: _keys(c) >= c.positions[:, None])),
    attention("mask from the pass's own start",
        "the causal mask counts from the start of the pass instead of the sequence",
        _masked(lambda c: _keys(c) <= np.asarray(c.rows)[:, None])),
    attention("mask after the softmax", "masked weights are zeroed after norming, the rest is not normed again",
        _late_mask),
    attention("not normed", "exponentials are not divided by their sum", _unnormed),
    attention("one added to the sum", "the sum of exponentials has one more term of 1 (attention sink)",
        _off_by_one_softmax),
    attention("sigmoid instead of softmax", "every score goes through a sigmoid", _sigmoid),
    attention("softmax skipped", "scaled scores are used as weights",
        lambda c: np.where(_mask(c), _scaled(c), 0.0)),
    attention("uniform weights", "every visible key gets the same weight",
        lambda c: softmax(np.zeros_like(c.inputs[0]), _mask(c))),
)
# fmt: on

# --- fitted: scores -------------------------------------------------------------------------------------------


def _differences(context: Context) -> tuple[Array, Array]:
    """Return, for keys with weight, score and log weight relative to the strongest key of the same row."""
    weights, scores = context.target, context.inputs[0]
    with np.errstate(all="ignore"):
        usable = _mask(context) & (weights > LEAST) & np.isfinite(weights)
        best = np.where(usable, weights, -1.0).argmax(axis=-1)[..., None]
        x = scores - np.take_along_axis(scores, best, axis=-1)
        y = np.log(weights) - np.log(np.take_along_axis(weights, best, axis=-1))
    usable &= usable.any(axis=-1, keepdims=True) & (np.arange(weights.shape[-1]) != best)
    if not usable.any():
        raise Inapplicable
    return x[usable], y[usable]


def _scales(context: Context) -> Iterator[Fit]:
    """Estimate the factor of the scores from ratios of attention weights: no norm and no sink enters those."""
    x, y = _differences(context)
    scale, right = factor(y, x), _right_scale(context)
    if x.size >= 2 and not close(scale, (right,), 1e-5) and abs(scale) > 1e-9:
        words = f"{number(scale, 4)} instead of {number(right, 4)}"
        yield Fit(words, lambda c: softmax(c.inputs[0] * scale, _mask(c)))


def _capped(scores: Array, cap: float) -> Array:
    return cap * np.tanh(scores / cap)


def _caps(context: Context) -> Iterator[Fit]:
    """Estimate the limit c of c·tanh(score / c), of scaled scores."""
    scores, target, visible = _scaled(context), context.target, _mask(context)
    if not np.isfinite(target).all():
        return
    rows = np.unique(np.linspace(0, context.n_rows - 1, MOST_ROWS).astype(int))
    scores, target, visible = scores[:, rows], target[:, rows], visible[rows]
    largest = float(np.abs(np.where(visible, scores, 0.0)).max())
    if largest == 0:
        return

    def distance(log_cap: float) -> float:
        return float(np.linalg.norm(softmax(_capped(scores, np.exp(log_cap)), visible) - target))

    cap = log_minimum(distance, np.log(largest), 5.0)
    if cap < 100 * largest:
        yield Fit(number(cap, 3), lambda c: softmax(_capped(_scaled(c), cap), _mask(c)))


def _sinks(context: Context) -> Iterator[Fit]:
    """Estimate an extra term of the sum of exponentials from how far the weights of a row sum to less than one."""
    scores = np.where(_mask(context), _scaled(context), -np.inf)
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
        sink = np.full(per_head.shape, overall)
        yield Fit(f"of {number(overall, 3)}", lambda c: _with_sink(c, sink))
    if terms.shape[1] > 1 and np.ptp(per_head) > 1e-3 * per_head.max():
        words = f"of {', '.join(number(x, 3) for x in per_head)} for heads 0, 1, …"
        yield Fit(words, lambda c: _with_sink(c, per_head))


def _with_sink(context: Context, per_head: Array) -> Array:
    masked = np.where(_mask(context), _scaled(context), -np.inf)
    largest = masked.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        weights = np.exp(masked - largest)
        return weights / (weights.sum(axis=-1, keepdims=True) + per_head[:, None, None] * np.exp(-largest))


# --- fitted: which keys are seen ------------------------------------------------------------------------------


def _seen(context: Context) -> Array:
    """Return which keys have weight in some head, ``(n_rows, n_kv)``."""
    return ((context.target != 0) & np.isfinite(context.target)).any(axis=0)


def _ends(context: Context) -> tuple[Array, Array]:
    """Return the first and the last key with weight in each row; n_kv and -1 where a row has none."""
    seen, keys = _seen(context), _keys(context)
    if not seen.any():
        raise Inapplicable
    return np.where(seen, keys, seen.shape[-1]).min(axis=-1), np.where(seen, keys, -1).max(axis=-1)


def _filled(context: Context, seen: Array) -> Array:
    """Softmax over the keys seen; rows that see nothing hold NaN, zeros or equal weights, as was recorded."""
    weights = softmax(_scaled(context), seen)
    blind = np.broadcast_to(~seen.any(axis=-1, keepdims=True), weights.shape)
    uniform, target = 1.0 / seen.shape[-1], context.target
    with np.errstate(invalid="ignore"):
        allowed = np.isnan(target) | (target == 0) | (np.abs(target - uniform) < 1e-6 * uniform)
    return np.where(blind & allowed, target, weights)


def _offsets(context: Context) -> Iterator[int]:
    """Determine from the weights how far past its own position a token sees."""
    first, last = _ends(context)
    n_kv, position = context.target.shape[-1], context.positions
    inside = (last >= 0) & (last < n_kv - 1)
    offsets = np.unique((last - position)[inside])
    if offsets.size == 1 and offsets[0] != 0 and (first[inside] == 0).all():
        yield int(offsets[0])


def _with_offset(context: Context, offset: int) -> Array:
    seen = _mask(context, offset)
    if seen.all():
        raise Inapplicable  # a mask that is missing altogether
    return _filled(context, seen)


def _windows(context: Context) -> Iterator[int]:
    """Determine from the weights how many keys up to its own a token sees."""
    first, last = _ends(context)
    position = context.positions
    widths = np.unique((position - first + 1)[(first > 0) & (last == position)])
    if widths.size == 1 and (position >= widths[0]).any():
        yield int(widths[0])


def _with_window(context: Context, width: int, kept: int = 0) -> Array:
    """Tokens see the last ``width`` keys and the first ones that are ``kept``."""
    near = (_keys(context) > context.positions[:, None] - width) | (_keys(context) < kept)
    return _filled(context, _mask(context) & near)


def _sink_windows(context: Context) -> Iterator[Fit]:
    """Determine from the weights which first keys stay visible besides a sliding window."""
    hidden = _mask(context) & ~_seen(context)
    rows = np.flatnonzero(hidden.any(axis=-1))
    starts = {int(np.flatnonzero(hidden[row])[0]) for row in rows}
    widths = {int(context.positions[row] - np.flatnonzero(hidden[row])[-1]) for row in rows}
    if len(starts) == len(widths) == 1 and min(starts) > 0 and min(widths) > 0:
        kept, width = starts.pop(), widths.pop()
        yield Fit(f"{width} keys and the first {kept}", lambda c: _with_window(c, width, kept))


def _chunks(context: Context) -> Iterator[int]:
    """Determine from the weights the size of chunks within which tokens see each other."""
    first, last = _ends(context)
    position = context.positions
    if not (first > 0).any() or not (last == position).all():
        return
    size = int(np.gcd.reduce(first[first > 0]))
    if size > 1 and np.array_equal(position // size * size, first) and np.unique(position - first).size > 1:
        yield size


def _with_chunks(context: Context, size: int) -> Array:
    return _filled(context, _mask(context) & (_keys(context) >= context.positions[:, None] // size * size))


HIDDEN = "keys of earlier tokens hidden"
fitted_attention = partial(fitted, family=9, ops=SOFTMAX)
# fmt: off
WINDOWS = (
    attention("sliding window of {}", "tokens see the last {} keys only", _with_window, _windows, group=HIDDEN),
    fitted_attention("sliding window of {}", "tokens see the last {} only", _sink_windows, group=HIDDEN),
)
"""Tried together with a mask in reverse: one decoded token cannot tell them apart."""
FITTED = (
    fitted_attention("score scale {}", "scores are multiplied by {}", _scales),
    fitted_attention("scores capped at {}", "scaled scores x go through c·tanh(x/c) with c = {} (soft cap)",
        _caps, deferred=True),
    fitted_attention("attention sink {}", "the sum of exponentials has one more term {} (attention sink)", _sinks),
    attention("mask off by {:+d}", "the causal mask lets tokens see keys up to their own position {:+d}",
        _with_offset, _offsets),
    attention("attention in chunks of {}", "tokens see the keys of their own chunk of {} only", _with_chunks,
        _chunks, group=HIDDEN),
)
# fmt: on
