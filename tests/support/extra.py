"""Cases of a test beyond a sample of them: ``make test-all`` runs them, ``make test`` does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

EXTRA = pytest.mark.extra
SAMPLE = "not extra"
"""What pytest's ``-m`` is by default (pyproject.toml)."""
_every_case = False


def configure(markers: str) -> None:
    """Take every case unless ``markers``, pytest's ``-m``, asks for the sample."""
    global _every_case
    _every_case = markers != SAMPLE


def examples(n: int) -> int:
    """Return how many of ``n`` drawn examples are tried: of the sample's, a third."""
    return n if _every_case else n // 3


def sampled(cases: Iterable[Any], every: int, by: Callable[[Any], tuple[Any, ...]] = lambda case: ()) -> list[Any]:
    """Return cases for ``parametrize``, of which all but each ``every``-th are marked ``extra``.

    ``by`` gives what of a case has to be covered: a case that has a value at a place where no case before it had
    it is kept as well.
    """
    covered: set[tuple[int, str]] = set()
    given = []
    for number, case in enumerate(cases):
        values = {(place, repr(value)) for place, value in enumerate(by(case))}
        kept = number % every == 0 or not values <= covered
        covered |= values if kept else set()
        given.append(case if kept else _marked(case))
    return given


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=EXTRA)
