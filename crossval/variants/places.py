"""Which tokens or features something happened to, said as a rule: a remainder, a limit, a slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[Any]
"""Booleans."""

PERIODS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GROUPS = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of tokens that kernels are known to work on at a time."""


def runs(flags: npt.ArrayLike) -> list[range]:
    """Return the runs of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(flags, np.bool_), [False]])))
    return [range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def listed(words: npt.ArrayLike, most: int = 8) -> str:
    """Return ``1, 2, 3``, cut after some."""
    said = [str(word) for word in np.asarray(words).tolist()]
    return ", ".join(said[:most]) + (", ..." if len(said) > most else "")


def described(flags: Flags, noun: str) -> str:
    """Return ``features 320 to 640 (exclusive)``, ``tokens t mod 4 ≠ 0``, or the first of several ranges."""
    found = runs(flags)
    if len(found) == 1:
        one = found[0]
        return f"{noun} {one.start}" if len(one) == 1 else f"{noun}s {one.start} to {one.stop} (exclusive)"
    period = period_of(flags)
    if period is not None:
        return f"{noun}s {_remainder(period, noun[0])}"
    return f"{noun}s {listed([f'{r.start}-{r.stop - 1}' if len(r) > 1 else str(r.start) for r in found], 4)}"


def period_of(flags: Flags) -> Flags | None:
    """Return the shortest pattern, neither all true nor all false, that flags repeat, seen more than once."""
    for period in PERIODS:
        if period < flags.size:
            part = flags[:period]
            if part.any() and not part.all() and np.array_equal(np.resize(part, flags.size), flags):
                return part
    return None


def _remainder(part: Flags, letter: str) -> str:
    hit, rest = np.flatnonzero(part), np.flatnonzero(~part)
    if rest.size == 1 and hit.size > 1:
        return f"{letter} mod {part.size} ≠ {rest[0]}"
    return f"{letter} mod {part.size} {'= ' if hit.size == 1 else 'in '}{listed(hit)}"


@dataclass(frozen=True)
class Rule:
    """Tokens of a pass of any length."""

    kind: Literal["remainder", "limit", "rest", "slice"]
    part: tuple[bool, ...] = ()
    """Of ``remainder``: the pattern that is repeated."""
    first: int = 0
    """Of ``limit`` and ``slice``."""
    stop: int = 0
    group: int = 0
    """Of ``rest``: the tokens left over after groups of so many."""

    @property
    def words(self) -> str:
        """The tokens as a noun."""
        if self.kind == "remainder":
            return f"tokens {_remainder(np.asarray(self.part), 't')}"
        if self.kind == "limit":
            return f"tokens from {self.first} on"
        if self.kind == "rest":
            return f"last n mod {self.group} tokens"
        return f"token {self.first}" if self.stop == self.first + 1 else f"tokens {self.first} to {self.stop - 1}"

    def hits(self, n_tokens: int) -> Flags:
        """Return the tokens of a pass."""
        at = np.arange(n_tokens)
        if self.kind == "remainder":
            return np.resize(np.asarray(self.part, np.bool_), n_tokens)
        if self.kind == "limit":
            return at >= self.first
        if self.kind == "rest":
            whole = n_tokens - n_tokens % self.group
            return (at >= whole) & (whole > 0)
        return (at >= self.first) & (at < self.stop)


def rules(flags: Flags) -> Iterator[Rule]:
    """Yield every rule by which exactly these tokens of a pass are hit; several are told apart by other passes."""
    if not flags.any() or flags.all():
        return
    part, found = period_of(flags), runs(flags)
    if part is not None:
        yield Rule("remainder", part=tuple(bool(one) for one in part))
    if len(found) > 1:
        return
    (one,) = found
    if one.stop == flags.size:
        yield Rule("limit", first=one.start)
        for group in GROUPS:
            if group <= flags.size and flags.size % group == len(one):
                yield Rule("rest", group=group)
    elif part is None:
        yield Rule("slice", first=one.start, stop=one.stop)
