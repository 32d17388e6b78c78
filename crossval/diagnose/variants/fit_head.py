"""Logits in other places, found by their values; soft caps of scores and logits, any limit (families 9, 10)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Estimate, golden, number
from crossval.diagnose.variants.linear import head
from crossval.diagnose.variants.places import listed
from crossval.diagnose.variants.variant import Variant, on

HEAD = on("result_output")
CAPPED = on("kq", "result_output")
SAME = 2e-6
"""Logits nearer than this, relative to the largest, cannot be told apart."""
MOST_VALUES = 4096
GROUPS = (2, 4, 8, 16, 32, 64, 128, 256)
MOST_LISTED = 16

# --- logits in other places -----------------------------------------------------------------------------------


def _unique(recorded: Array, right: Array) -> Array:
    """Return for each recorded logit the only place whose right value it can be; -1: none, or several."""
    order = np.argsort(right)
    values, least = right[order], SAME * float(np.abs(right).max())
    first = np.searchsorted(values, recorded - least)
    stop = np.searchsorted(values, recorded + least, side="right")
    return np.where(stop - first == 1, order[np.minimum(first, order.size - 1)], -1)


def _sources(context: Context) -> Array:
    """Return for each logit the token id whose value it holds, as far as that is certain; else -1."""
    whole = context.sampled(None)
    if not np.isfinite(whole.target).all():
        raise Inapplicable
    found = _unique(whole.target[-1], whole.expected[-1])
    own = np.arange(found.size)
    certain = found >= 0
    if certain.sum() < max(8, found.size // 4) or (found == own)[certain].all():
        raise Inapplicable
    return found


def _orders(context: Context) -> Iterator[Estimate]:
    """Find the rule by which logits lie in the places of others."""
    found = _sources(context)
    n = found.size
    at = np.flatnonzero(found >= 0)
    step = (found[at] - at) % n
    if np.unique(step).size == 1:
        shift = int(step[0]) if 2 * step[0] <= n else int(step[0]) - n
        yield Estimate(f"shifted by {-shift:+d}", ("shift", shift))
        return
    if np.array_equal(found[at], n - 1 - at):
        yield Estimate("in reverse", ("reverse",))
        return
    for size in GROUPS:
        inside = _inside(found, at, size)
        if inside is not None:
            words = f": {listed(inside, MOST_LISTED)}" if size <= MOST_LISTED else ""
            yield Estimate(f"in groups of {size} in another order{words}", ("group", *inside))
            return
    moved = at[found[at] != at]
    if moved.size <= MOST_LISTED and set(found[moved].tolist()) == set(moved.tolist()):
        words = f"of token ids {listed(moved, MOST_LISTED)} those of {listed(found[moved], MOST_LISTED)}"
        yield Estimate(words, ("these", *moved.tolist(), *found[moved].tolist()))


def _inside(found: Array, at: Array, size: int) -> list[int] | None:
    """Return the order within groups where it is the same in all of them and seen twice; the rest stays."""
    n = found.size // size * size
    at = at[at < n]
    if at.size < 2 * size or (found[at] // size != at // size).any():
        return None
    order = np.full(size, -1)
    order[at % size] = found[at] % size
    if (order < 0).any() or (order[at % size] != found[at] % size).any() or np.unique(order).size != size:
        return None
    return order.tolist()


def _in_order(context: Context, order: Estimate) -> Array:
    n = context.recorded[0].size
    wanted = np.arange(n) if context.features is None else context.features
    kind, *numbers = order.value
    if kind == "shift":
        taken = (wanted + numbers[0]) % n
    elif kind == "reverse":
        taken = n - 1 - wanted
    elif kind == "group":
        size = len(numbers)
        inside = wanted // size * size + np.asarray(numbers)[wanted % size]
        taken = np.where(wanted < n // size * size, inside, wanted)
    else:
        half = len(numbers) // 2
        moved = dict(zip(numbers[:half], numbers[half:], strict=True))
        taken = np.array([moved.get(int(place), int(place)) for place in wanted])
    return head(context.sampled(taken))


# --- soft caps ------------------------------------------------------------------------------------------------


def _caps(context: Context) -> Iterator[Estimate]:
    """Fit the limit c of c·tanh(x / c)."""
    seen = np.ones(context.target.shape, bool) if context.visible is None else context.visible
    seen = np.broadcast_to(seen, context.target.shape)
    x, y = context.expected[seen], context.target[seen]
    if not np.isfinite(y).all() or not x.any():
        return
    largest = np.argsort(np.abs(x))[-MOST_VALUES:]
    x, y = x[largest], y[largest]

    def distance(log_cap: float) -> float:
        cap = np.exp(log_cap)
        return float(np.linalg.norm(cap * np.tanh(x / cap) - y))

    start = float(np.log(np.abs(x).max()))
    tried = np.linspace(start - 5.0, start + 5.0, 41)
    best = tried[np.argmin([distance(one) for one in tried])]
    cap = float(np.exp(golden(distance, best - 0.25, best + 0.25)))
    if cap < 100 * np.abs(x).max():
        yield Estimate(number(cap, 3), cap)


def _capped(context: Context, cap: Estimate) -> Array:
    return cap.value * np.tanh(context.expected / cap.value)


FITTED = (
    Variant(
        "logits {}",
        10,
        HEAD,
        "logits lie {}, in the output or by the rows of the table",
        _in_order,
        _orders,
        group="logits in another order",
        shown="logits shifted by *d*; logits in groups of *n* in another order; logits in reverse",
        shown_sentence="logits, or rows of the table, lie in other places: found by looking each value up",
    ),
    Variant("capped at {}", 9, CAPPED, "values x go through c·tanh(x/c) with c = {} (soft cap)", _capped, _caps),
)
