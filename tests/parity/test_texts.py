"""What broken engines print: real faults in the real engine give the texts that the measured file counts."""

from __future__ import annotations

import pytest

from crossval.texts.evidence import evidence
from tests.zoo.texts import HELD_OUT, PROMPTS, Broken, broken, texts
from tests.zoo.texts_table import rights, signature_of

SAMPLE = ("rope-interleaved", "act-silu", "nan", "file-read-sequentially", "end-ignored", "pieces-raw", "uniform")
"""Faults of engine, file and what is around."""


@pytest.fixture(scope="module")
def right():
    return rights()


@pytest.fixture(scope="module")
def counted(right, tmp_path_factory):
    """Signatures of one prompt of either kind, of every engine of the sample and of a right one."""
    engines = [Broken("", "", ""), *(one for one in broken() if one.fault in SAMPLE)]
    given = texts(engines, (PROMPTS[0], HELD_OUT[2]), tmp_path_factory.mktemp("texts"))
    return [(text, signature_of(text, right[text.prompt])) for text in given]


def test_the_right_engine_prints_the_right_text(counted):
    assert [one.departure for text, one in counted if text.engine.fault == ""] == ["none", "none"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_prints_what_the_file_says_it_printed(counted, name):
    measured = next(one for one in evidence().faults if one.name == name)
    found = [(text, one) for text, one in counted if text.engine.fault == name]
    assert found
    assert {one for text, one in found if text.prompt == PROMPTS[0]} <= measured.seen.keys()
    assert {one for text, one in found if text.prompt == HELD_OUT[2]} <= measured.held_out.keys()
    assert any(one.departure != "none" for _, one in found)


def test_the_right_texts_are_the_models(right):
    assert b"".join(right[PROMPTS[0]].tokens) == b" 4."
    assert all(one.ended for one in right.values())
