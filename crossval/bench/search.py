"""With how many threads, and where, an engine is fastest: what is tried, and what is chosen for each measure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

N_TRIALS = 3
"""Tries of each setting, of all settings in turn."""

Idle = Literal["sleeps", "stopped", "unseen"]
"""What an engine did while others were measured: all threads slept, it had to be stopped, or it cannot be seen."""


@dataclass(frozen=True)
class Setting:
    """How many threads, and the processor of each; ``cores`` is empty where the system places them."""

    n_threads: int
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tried:
    """A setting and what it took, in seconds, by name of the measure."""

    setting: Setting
    raw: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Search:
    """Every setting that an engine was tried in."""

    tried: tuple[Tried, ...]
    n_threads: int | None = None
    """The only number of threads that may be chosen; None: any."""
    idle: Idle = "unseen"
    not_pinned: str | None = None
    """Why threads were not pinned, where they were to be."""

    def chosen(self, measure: str) -> Setting | None:
        """Return the setting with the smallest median; None when the measure was not tried in an allowed one."""
        allowed = [
            one for one in self.tried if one.raw.get(measure) and self.n_threads in (None, one.setting.n_threads)
        ]
        best = min(allowed, key=lambda one: statistics.median(one.raw[measure]), default=None)
        return None if best is None else best.setting

    def one_thread(self, measure: str) -> tuple[float, ...]:
        """Return what a single thread took."""
        return tuple(
            value for one in self.tried if one.setting.n_threads == 1 for value in one.raw.get(measure, ())
        )


def thread_counts(n_max: int) -> list[int]:
    """Return the numbers of threads to try: 1, 2, 4 and so on, and the largest."""
    counts = [1]
    while 2 * counts[-1] < n_max:
        counts.append(2 * counts[-1])
    return [*counts, n_max] if n_max > 1 else counts


def settings_to_try(cores: Sequence[int], n_threads: int | None, *, can_place: bool) -> list[Setting]:
    """Return the settings to try, fewest threads first.

    A single thread is always among them: more threads are to be faster. Several threads are tried
    pinned, each to a core of its own, as well as free.

    Args:
        cores: processors that may be used, in the order in which threads get them.
        n_threads: the only number of threads besides one; None: up to as many as there are cores.
        can_place: whether threads can be pinned.
    """
    counts = thread_counts(len(cores)) if n_threads is None else sorted({1, n_threads})
    found = []
    for n in counts:
        found.append(Setting(n))
        if can_place and 1 < n <= len(cores):
            found.append(Setting(n, tuple(cores[:n])))
    return found
