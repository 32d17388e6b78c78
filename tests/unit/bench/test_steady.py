"""Whether rounds have one speed: the gap test and the median's interval on made-up distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from crossval.bench.steady import LEVEL, below_one_thread, gap_chance, median_interval, two_speeds

Draw = Callable[[random.Random], float]

ONE_SPEED: dict[str, Draw] = {
    "uniform": lambda rng: math.exp(rng.random()),
    "normal": lambda rng: math.exp(rng.gauss(0, 0.2)),
    "wide": lambda rng: math.exp(rng.gauss(0, 2)),
    "skewed": lambda rng: 1 + rng.expovariate(1),
    "heavy tail": lambda rng: rng.paretovariate(3),
    "falling": lambda rng: math.exp(rng.triangular(0, 1, 0)),
}
LEVEL_OF = {"heavy tail": 0.09, "skewed": 0.09}
"""Exponential tails leave wider gaps than the uniform distribution that the test is exact for."""
STACKED: Draw = lambda rng: math.exp(rng.gauss(0, 0.15)) * rng.choice((1, 15))  # noqa: E731
"""Both threads on one core in every second round."""


def flagged(draw: Draw, n: int, n_runs: int = 1000) -> float:
    """Return the fraction of runs of ``n`` rounds that have two speeds."""
    rng = random.Random(n)
    return sum(two_speeds([draw(rng) for _ in range(n)]) is not None for _ in range(n_runs)) / n_runs


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (0, 0)), (2, (0, 1)), (5, (0, 4)), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (21, (5, 15)), (50, (17, 32))],
)
def test_the_interval_of_the_median(n: int, expected: tuple[int, int]) -> None:
    assert median_interval(n) == expected  # tables of the sign test: n = 9: 2nd to 8th, n = 50: 18th to 33rd


@pytest.mark.parametrize("n", [6, 9, 14, 30])
def test_the_median_is_in_its_interval(n: int) -> None:
    rng, inside = random.Random(n), 0
    for _ in range(2000):
        values = sorted(rng.paretovariate(2) for _ in range(n))
        low, high = median_interval(n)
        inside += values[low] <= math.sqrt(2) <= values[high]
    assert inside / 2000 >= 1 - LEVEL - 0.01


@pytest.mark.parametrize(
    ("n_below", "n_above", "gap"), [(2, 2, 2.0), (2, 3, 3.0), (4, 5, 1.5), (7, 2, 1.0), (6, 6, 1.0), (2, 2, 0.0)]
)
def test_the_chance_of_a_gap(n_below: int, n_above: int, gap: float) -> None:
    rng, wide, n = random.Random(1), 0, 20_000
    for _ in range(n):
        values = sorted(rng.random() for _ in range(n_below + n_above))
        below, above = values[:n_below], values[n_below:]
        wide += above[0] - below[-1] >= gap * max(below[-1] - below[0], above[-1] - above[0])
    chance = gap_chance(n_below, n_above, gap)
    assert chance == pytest.approx(wide / n, abs=4 * math.sqrt(chance * (1 - chance) / n) + 1e-9)
    assert gap_chance(n_below, n_above, math.inf) == 0.0


@pytest.mark.parametrize("n", [4, 5, 9, 15, 21])
@pytest.mark.parametrize("name", ONE_SPEED)
def test_one_speed_is_seldom_taken_for_two(name: str, n: int) -> None:
    at_most = LEVEL_OF.get(name, LEVEL)
    assert flagged(ONE_SPEED[name], n) <= at_most + 3 * math.sqrt(at_most / 1000)


@pytest.mark.parametrize(("n", "at_least"), [(5, 0.55), (9, 0.9), (15, 0.9), (21, 0.9)])
def test_threads_on_one_core_every_second_round_are_seen(n: int, at_least: float) -> None:
    assert flagged(STACKED, n) >= at_least


@pytest.mark.parametrize(
    ("times", "n_fast"),
    [
        ([0.09, 0.7, 0.1, 0.75, 0.095, 0.8, 0.1], 4),
        ([1.0, 1.0, 1.0, 2.0, 2.0], 3),  # no width at all
        ([1.0, 1.01, 1.02, 1.03, 9.0], None),  # one outlier
        ([1.0, 1.01, 1.02, 1.03, 1.015, 1.005, 1.017, 9.0, 9.1], 7),
        ([1.0, 1.01, 1.02, 1.03, 1.015, 1.005, 1.017] * 3 + [9.0, 9.1], None),  # the median is not in doubt
        ([1.0, 1.001, 1.0005, 1.008, 1.0081], None),  # too close to show in a ratio
        ([1.0] * 9, None),
        ([1.0, 1.0, 50.0], None),  # too few to tell
        ([], None),
    ],
)
def test_two_speeds(times: list[float], n_fast: int | None) -> None:
    assert two_speeds(times) == n_fast
    assert two_speeds([time * 1e-6 for time in reversed(times)]) == n_fast


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.5, 0.6, 0.55, 0.52, 0.58], False),
        ([0.5, 0.6, 0.55, 0.52, 1.2], True),  # five values: the median may be any of them
        ([0.5] * 8 + [1.2], False),
        ([0.5] * 7 + [1.2] * 2, True),
        ([1.5] * 9, True),
        ([0.97] * 9, False),  # within what a single thread takes
        ([], False),
    ],
)
def test_more_threads_have_to_be_faster_than_one(times: list[float], *, expected: bool) -> None:
    one_thread = (0.9, 1.0, 0.95)
    assert below_one_thread(times, one_thread) is expected
    assert below_one_thread(times, ()) is False


def test_a_mixture_whose_median_is_fast_is_still_seen_by_its_slow_rounds() -> None:
    """Threads move during a round, so that no gap is left between the clusters."""
    times = [1.0, 1.02, 1.05, 1.1, 2.2, 4.0, 6.5]
    assert two_speeds(times) is None
    assert below_one_thread(times, (1.6, 1.7, 1.65))
    assert median(times) < 1.6
