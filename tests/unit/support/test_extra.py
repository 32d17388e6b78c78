"""The sample of cases that `make test` takes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.extra import EXTRA, SAMPLE, configure, examples, sampled


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


@pytest.mark.parametrize(("markers", "n"), [(SAMPLE, 20), ("", 60), ("live", 60)])
def test_fewer_examples_are_drawn_for_the_sample(request: pytest.FixtureRequest, markers: str, n: int) -> None:
    configure(markers)
    request.addfinalizer(lambda: configure(request.config.option.markexpr))
    assert examples(60) == n


def test_the_sample_is_what_pytest_takes_by_default() -> None:
    settings = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f"-m '{SAMPLE}'" in settings
