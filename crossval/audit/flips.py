"""Int8 flips: activations near a tie that an engine may have rounded to the other side, tried nearest first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from crossval.audit.bounds.approx import Flips, Ties
from crossval.model.kinds import TernaryMatrix, Weight

TRIAL_WEIGHTS = 2e10
"""Weights that may be multiplied while one token is searched for flips: bounds the time."""
MOST_TRIALS, FEWEST_TRIALS = 100, 8
"""Choices of flips tried for one token."""
FAILED_TRIALS = 300
"""Choices tried in vain for one engine, after which only the fewest are tried for a token: bounds its time."""
MOST_TIES = 100
"""Ties of one token and tensor that are looked at; with more of them it is not shown that nothing explains it."""
NEARNESS_COST = 4.0
"""How much later a tie just within reach is tried than one that is hit exactly, in flips."""

Attempt = Callable[[int, str, Flips], tuple[bool, Mapping[str, Ties]]]
"""(first row and first tensor in execution that have a flip to try, all flips) -> whether the token fits then, and
the ties of the rows and of the tensors from there on."""


class Tie(NamedTuple):
    """One activation that may be on the other side of a tie."""

    tap: str
    """Full name of the quantised tap."""
    row: int
    feature: int
    nearness: float


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    flips: dict[tuple[str, int], frozenset[int]] | None
    """Of the rows that changed; None: no choice of flips fits."""
    n_failed: int = 0
    """Choices tried in vain."""
    complete: bool = True
    """Whether all were tried."""


def most_trials(n_failed: int, weights: Sequence[Weight]) -> int:
    """Return how many choices may be tried for one token of a segment with these weights.

    ``n_failed``: choices tried in vain for this engine so far.
    """
    if n_failed >= FAILED_TRIALS:
        return FEWEST_TRIALS
    n_weights = 1 + sum(one.signs.size if isinstance(one, TernaryMatrix) else one.size for one in weights)
    return int(min(MOST_TRIALS, max(FEWEST_TRIALS, TRIAL_WEIGHTS / n_weights)))


def search(
    attempt: Attempt,
    ties: Mapping[str, Ties],
    rows: Sequence[int],
    order: Mapping[str, int],
    known: Flips,
    most: int,
) -> Found:
    """Try choices of flips, few and near ones first, until the token fits.

    ``ties`` of the ``rows`` that the token depends on; ``order`` of the quantised taps in execution; ``known``:
    flips that were found before.
    """
    queue: list[tuple[float, int, tuple[Tie, ...]]] = []
    counter = itertools.count()

    def place(tie: Tie) -> tuple[int, int, int]:
        return order[tie.tap], tie.row, tie.feature

    def extend(cost: float, taken: tuple[Tie, ...], near: Sequence[Tie]) -> None:
        last = place(taken[-1]) if taken else (-1, -1, -1)
        for tie in near:
            if place(tie) > last and tie not in taken:
                more = cost + 1.0 + NEARNESS_COST * tie.nearness
                heapq.heappush(queue, (more, next(counter), (*taken, tie)))

    extend(0.0, (), _nearest(ties, rows))
    complete = len(queue) < MOST_TIES
    for trial in range(most):
        if not queue:
            return Found(None, trial, complete)
        cost, _, taken = heapq.heappop(queue)
        flips = dict(known)
        for tie in taken:  # one that is there already is taken back
            key = (tie.tap, tie.row)
            flips[key] = flips.get(key, frozenset()) ^ {tie.feature}
        fits, near = attempt(min(tie.row for tie in taken), taken[0].tap, flips)
        if fits:
            return Found({key: flips[key] for key in {(tie.tap, tie.row) for tie in taken}})
        extend(cost, taken, _nearest(near, rows))
    return Found(None, most, complete and not queue)


def _nearest(ties: Mapping[str, Ties], rows: Sequence[int]) -> list[Tie]:
    """Return the ties of some rows, nearest first, ``MOST_TIES`` of each tensor at most."""
    found = []
    for tap, one in ties.items():
        at = np.flatnonzero(np.isin(one.rows, rows))
        at = at[np.argsort(one.nearness[at], kind="stable")[:MOST_TIES]]
        found += [Tie(tap, int(one.rows[i]), int(one.features[i]), float(one.nearness[i])) for i in at]
    return found
