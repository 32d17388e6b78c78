from __future__ import annotations

import time

import pytest

from crossval.errors import BadInputError
from crossval.smoke import patterns


def test_search_is_pythons_search() -> None:
    pairs = [("Par[i]s", "It is Paris."), ("^Paris", "It is Paris."), (r"(?i)\bfour\b", "Four"), ("é\n", "é\nx")]
    assert list(patterns.search(pairs).values()) == [True, False, True, True]
    assert patterns.search([]) == {}


def test_defects() -> None:
    found = patterns.defects(["ok", "(", "a*", r"\b4\b", "x" * 2000])
    assert [found["ok"], found[r"\b4\b"]] == [None, None]
    assert "not a regular expression" in str(found["("])
    assert "any answer would be correct" in str(found["a*"])
    assert "2000 characters" in str(found["x" * 2000])
    with pytest.raises(BadInputError, match="not a regular expression"):
        patterns.search([("(", "text")])


def test_a_pattern_that_would_take_years_is_an_error_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_S", 1.0)
    begun = time.monotonic()
    with pytest.raises(BadInputError, match=r"pattern '\(a\+\)\+b': no answer within 1 s"):
        patterns.search([("quick", "quick"), ("(a+)+b", "a" * 60)])
    assert time.monotonic() - begun < 5
    with pytest.raises(BadInputError, match="no answer"):
        patterns.defects(["(?:|||){40}(?!)"])
