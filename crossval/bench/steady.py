"""Whether the rounds of a measure have one speed: if not, no ratio is made of them (docs/bench.md).

All values are times, so larger is slower. Logarithms are compared, because a disturbance multiplies a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.05
"""Chance that is accepted of seeing two speeds where there is one, and of a median outside its interval."""
LEAST_GAP = math.log(1.01)
"""Two speeds closer than this change no ratio in the digits that are shown."""
MIN_CLUSTER = 2
"""One value alone is an outlier."""


def median_interval(n: int) -> tuple[int, int]:
    """Return the first and the last rank, from 0, between which the median lies of what ``n`` values are from.

    The interval of the sign test: whatever the distribution, the median is outside with a probability of at
    most ``LEVEL``; of fewer than six values all of them are the interval (5: 1 in 16).
    """
    low, below = 0, 1.0
    while 2 * (below + math.comb(n, low + 1)) <= LEVEL * 2**n:
        low += 1
        below += math.comb(n, low)
    return low, n - 1 - low


def gap_chance(n_below: int, n_above: int, gap: float) -> float:
    """Return the probability of a gap as wide between neighbours, at this place, in values of one speed.

    ``gap``: its width in multiples of the range of the values below it or above it, whichever is larger. One
    speed is taken as a uniform distribution, the flattest with one mode. The gaps of its sorted values are to each
    other as independent exponential variables, so the ranges are sums of ``n - 1`` of them: with ``F_k`` the
    distribution of a sum of k, the probability is the integral of
    ``gap * exp(-gap x) * F_{below-1}(x) * F_{above-1}(x)``. (By simulation, values with an exponential tail are
    taken for two speeds in up to 9 % of cases, normal ones in less than 4 %.)
    """
    if math.isinf(gap):
        return 0.0
    below, above = range(n_below - 1), range(n_above - 1)
    one = sum((gap + 1) ** -(i + 1) for i in below) + sum((gap + 1) ** -(j + 1) for j in above)
    both = sum(math.comb(i + j, i) * (gap + 2) ** -(i + j + 1) for i in below for j in above)
    return max(0.0, 1 - gap * one + gap * both)


def two_speeds(times: Sequence[float]) -> int | None:
    """Return how many of the sorted times are the faster cluster of two, or None when they have one speed.

    Two clusters, of at least ``MIN_CLUSTER`` values each: the gap between them is so wide beside their own
    ranges that all gaps in reach of the median together have a chance of at most ``LEVEL`` to be as
    wide, and the median may belong to either of them.
    """
    logs = sorted(math.log(time) for time in times)
    low, high = median_interval(len(logs))
    splits = [n for n in range(low + 1, high + 1) if MIN_CLUSTER <= n <= len(logs) - MIN_CLUSTER]
    if not splits:
        return None
    gaps = {n: _gap(logs, n) for n in splits}
    widest = max(splits, key=lambda n: gaps[n])
    chance = sum(gap_chance(n, len(logs) - n, gaps[widest]) for n in splits)
    wide_enough = logs[widest] - logs[widest - 1] > LEAST_GAP
    return widest if wide_enough and chance <= LEVEL else None


def below_one_thread(times: Sequence[float], one_thread: Sequence[float]) -> bool:
    """Return whether the median of the times may be slower than every time of a single thread."""
    if not times or not one_thread:
        return False
    return sorted(times)[median_interval(len(times))[1]] > max(one_thread)


def _gap(logs: Sequence[float], n: int) -> float:
    """Return the gap above the ``n`` smallest values in multiples of the larger range beside it."""
    width = max(logs[n - 1] - logs[0], logs[-1] - logs[n])
    gap = logs[n] - logs[n - 1]
    return gap / width if width > 0 else math.inf if gap > 0 else 0.0
