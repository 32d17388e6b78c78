from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

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
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(BadInputError, match=r"pattern '\(a\+\)\+b': no answer within 1 s"):
        patterns.search([("quick", "quick"), ("(a+)+b", "a" * 60)])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 5
    with pytest.raises(BadInputError, match="no answer"):
        patterns.defects(["(?:|||){40}(?!)"])


def test_a_busy_machine_is_no_defect_of_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = patterns._CHILD.replace("import json", "import time; time.sleep(1.5)\nimport json")
    monkeypatch.setattr(patterns, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(patterns, "_CHILD", slow)
    assert patterns.search([("b+usy", "bbusy")]) == {("b+usy", "bbusy"): True}
    monkeypatch.setattr(patterns, "_WAIT_FACTOR", 0.5)
    with pytest.raises(BadInputError, match=r"could not be matched: 0\.5 s passed without the 1 s of"):
        patterns.search([("b+usier", "bbusier")])


def test_the_child_ends_by_itself_when_nobody_waits_for_it() -> None:
    command = [sys.executable, "-I", "-S", "-c", patterns._CHILD, "0.2"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(("(a+)+b", "a" * 60)).encode() + b"\n")
    child.stdin.flush()  # and stays open
    assert child.wait(timeout=60) == -signal.SIGPROF
    child.stdin.close()
