"""Which tokens or features are affected, as a rule: a remainder, a limit, a slice."""

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
"""Numbers of tokens that kernels are known to process together."""


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
    repeated = periods(flags)
    if len(repeated) == 1:
        return f"{noun}s {_remainder(repeated[0], noun[0])}"
    return f"{noun}s {listed([f'{r.start}-{r.stop - 1}' if len(r) > 1 else str(r.start) for r in found], 4)}"


def periods(flags: Flags) -> list[Flags]:
    """Return the patterns, neither all true nor all false, that flags repeat; no multiple of a shorter one.

    Periods other than powers of two have to be seen twice completely; a single token or feature is not a pattern.
    """
    found: list[Flags] = []
    if min(np.count_nonzero(flags), np.count_nonzero(~flags)) < 2:
        return found
    for period in PERIODS:
        part, least = flags[:period], period + 1 if period in GROUPS else 2 * period
        if flags.size < least or any(period % one.size == 0 for one in found):
            continue
        if part.any() and not part.all() and np.array_equal(np.resize(part, flags.size), flags):
            found.append(part)
    return found


def _remainder(part: Flags, letter: str) -> str:
    hit, rest = np.flatnonzero(part), np.flatnonzero(~part)
    if rest.size == 1 and hit.size > 1:
        return f"{letter} mod {part.size} ≠ {rest[0]}"
    return f"{letter} mod {part.size} {'= ' if hit.size == 1 else 'in '}{listed(hit)}"


@dataclass(frozen=True)
class Rule:
    """Tokens of a pass of any length."""

    kind: Literal["remainder", "limit", "rest", "these"]
    part: tuple[bool, ...] = ()
    """Of ``remainder``: the pattern that is repeated; of ``these``: every token."""
    first: int = 0
    """Of ``limit``."""
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
        return described(np.asarray(self.part), "token")

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
        hit = np.zeros(n_tokens, np.bool_)
        hit[: len(self.part)] = self.part[:n_tokens]
        return hit


def rules(flags: Flags) -> Iterator[Rule]:
    """Yield every rule that selects exactly these tokens of a pass; other passes tell several rules apart."""
    if not flags.any() or flags.all():
        return
    repeated, found = periods(flags), runs(flags)
    for part in repeated:
        yield Rule("remainder", part=tuple(bool(one) for one in part))
    one = found[-1]
    if len(found) == 1 and one.stop == flags.size:
        yield Rule("limit", first=one.start)
        for group in GROUPS:
            if group <= flags.size and flags.size % group == len(one):
                yield Rule("rest", group=group)
    elif not repeated:
        yield Rule("these", part=tuple(bool(flag) for flag in flags))
