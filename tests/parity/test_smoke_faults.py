"""Inject a fault into every layer: the text turns to nonsense and `crossval smoke` fails.

That each fault is what its name says, in every kernel family, is proved by ``test_zoo``.
"""

from __future__ import annotations

import re

import pytest

from crossval.smoke.suite import load_suite
from tests.support.extra import sampled
from tests.support.native_build import ROOT
from tests.zoo.smoke import FAULTS, ask


def test_the_model_answers():
    found = ask("")
    assert found.exit_code == 0
    assert found.n_prompts == len(load_suite("long").prompts)
    card = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"^\| all \|.*\| (\d+)/(\d+) \([\d.]+%\) \|$", card, re.M)
    assert stated is not None
    assert (found.correct, found.n_prompts) == tuple(map(int, stated.groups()))


@pytest.mark.parametrize("name", sampled(sorted(FAULTS.keys() - {"none"}), 3))
def test_a_broken_engine_answers_less_than_half(name):
    found = ask(FAULTS[name][0])
    assert found.exit_code == 1, found
    assert found.accuracy < 0.5, found
