"""The sample of cases that `make test` takes."""

from __future__ import annotations

from itertools import product
from typing import Any

from tests.support.extra import EXTRA, sampled


def kept(cases: list[Any]) -> list[Any]:
    return [case for case in cases if EXTRA not in getattr(case, "marks", ())]


def test_every_case_stays_and_every_value_is_covered() -> None:
    cases = list(product("abc", range(5)))
    given = sampled(cases, 4, tuple)
    assert [getattr(case, "values", case) for case in given] == cases
    assert len(kept(given)) < len(cases)
    for place in range(2):
        assert {case[place] for case in kept(given)} == {case[place] for case in cases}


def test_without_values_to_cover_it_is_each_nth() -> None:
    assert kept(sampled("abcdefg", 3)) == ["a", "d", "g"]
    assert len(kept(sampled(product("ab", "cd"), 9))) == 1
