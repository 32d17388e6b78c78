"""How the work of a reader grows with its input: CPU time at one, two and four times the size."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

FACTORS = (1, 2, 4)
MOST = 7.5
"""Times the work at four times the size: 4 where it is linear, 16 where it is quadratic."""
ATTEMPTS = 4
Refusal = type[Exception] | tuple[type[Exception], ...]


def cpu_s(work: Callable[[], Any], refusal: Refusal) -> float:
    """Return the CPU time of this process in seconds; ``refusal`` is an answer like any other."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        with contextlib.suppress(refusal):
            work()
        return time.process_time() - start
    finally:
        gc.enable()


def growth(make: Callable[[int], Any], read: Callable[[Any], Any], n: int, refusal: Refusal) -> float:
    """Return by what factor the CPU time grows from ``n`` to ``4 n`` items; the smallest of a few attempts.

    Other work on the machine makes single times longer, never shorter: times are the shortest seen.
    """
    inputs = [make(factor * n) for factor in FACTORS]
    gc.freeze()  # what there is already is not looked through before each measurement
    shortest = [cpu_s(lambda one=one: read(one), refusal) for one in inputs]  # type: ignore[misc]
    for _ in range(ATTEMPTS):
        if max(shortest[2] / shortest[0], 2 * shortest[2] / shortest[1]) < MOST:
            break
        shortest = [
            min(least, cpu_s(lambda one=one: read(one), refusal))  # type: ignore[misc]
            for least, one in zip(shortest, inputs, strict=True)
        ]
    return max(shortest[2] / shortest[0], 2 * shortest[2] / shortest[1])
