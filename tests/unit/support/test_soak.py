"""The soak notices what it is there for: orphans, things left behind, half-written files, wrong exit codes."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import soak
from tests.soak import JOURNAL, RECEIPT, Case, Outcome, Run, processes, summary
from tests.support import receipt_samples

GOOD = """
import os, shutil, subprocess, sys, tempfile, time
shutil.copy(sys.argv[1], "r.json")
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    receipt_samples.layers_receipt().save(tmp_path / "good.json")
    return tmp_path / "good.json"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal: where the tests run in the background it is ignored, in their commands as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def case(good: Path, code: str) -> Case:
    return Case("fake", (str(good),), 1, program=(sys.executable, "-c", GOOD + code))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("", None),
        ("sys.exit(3)", "exit 3 without a kill: nothing"),
        ("print('a\\nb'); sys.exit(1)", "exit 1 without a kill: b"),
        ("tempfile.mkdtemp('', 'mine')", "left behind: ['mine"),
        ("open('.r.json.x', 'w')", "left behind: ['.r.json.x']"),
        ("open('r.json', 'r+').truncate(99)", "half written after no kill"),
        ("os.remove('r.json')", "half written after no kill"),
        ("subprocess.Popen(['sleep', '60'], start_new_session=True)", "orphan after : b'sleep 60 '"),
        ("open('r.json', 'r+').write('{\"schema_version\":1,\"kind\":\"diff\"')", "half written after no kill"),
    ],
)
def test_what_a_command_leaves_is_a_problem(
    good: Path, code: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "GRACE_S", 0.3)
    run, outcome = Run(case(good, code), 0, good.parent / "runs", seed=0), Outcome("fake", "", 0)
    run.again(outcome)
    assert len(outcome.problems) == (problem is not None)
    assert problem is None or problem in outcome.problems[0]
    assert processes(run.mark) == []


def test_a_killed_command_runs_again_and_what_it_left_is_counted(
    good: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    def wait(run: Run, seconds: float) -> None:
        while not (run.temporary / "left").exists():
            time.sleep(0.01)

    monkeypatch.setattr(Run, "wait", wait)
    code = """
left = os.path.join(tempfile.gettempdir(), "left")
if os.path.exists(left):
    os.remove(left)
else:
    open(left, "w")
    time.sleep(60)
"""
    found = {}
    for number in range(6):
        outcome = Run(case(good, code), number, good.parent / "runs", seed=1).killed(expected_s=1.0)
        found.setdefault(outcome.kill, outcome)
    assert {"SIGKILL parent", "SIGTERM parent"} <= set(found)
    assert found["SIGKILL parent"].problems == []
    assert found["SIGKILL parent"].exit_code == -9
    assert found["SIGKILL parent"].n_left == 1
    assert found["SIGTERM parent"].problems[0].startswith("left behind after SIGTERM parent: ['left']")


def test_prompts_of_a_journal_are_counted_without_its_first_line(good: Path) -> None:
    run = Run(Case("fake", (), 1, files=frozenset({JOURNAL, RECEIPT})), 0, good.parent / "runs", seed=0)
    assert run.n_journaled() is None
    for text, n_done in (("", 0), ("{}\n", 0), ("{}\n{}\n{}\n{", 2)):
        (run.work / JOURNAL).write_text(text)
        assert run.n_journaled() == n_done


def test_the_summary_counts() -> None:
    outcomes = [
        Outcome("a", "", 0),
        Outcome("a", "SIGKILL parent", -9, n_left=1),
        Outcome("b", "SIGTERM child", 5, ["bad"]),
    ]
    text = summary(outcomes)
    assert "3 runs, 2 killed, 2 repeated after that" in text
    assert "runs: a 2, b 1" in text
    assert "removed by the next: 1" in text
    assert "with a problem: 1" in text


@pytest.mark.parametrize(
    ("printed", "is_python"),
    [
        ("Fatal Python error: init_import_site: Failed to import the site module\\nKeyboardInterrupt", True),
        ("Could not import runpy module\\nKeyboardInterrupt", True),
        ("Traceback (most recent call last):\\nKeyboardInterrupt", False),
    ],
)
def test_ctrl_c_before_the_first_line_of_the_program_is_pythons_affair(
    good: Path, monkeypatch: pytest.MonkeyPatch, printed: str, is_python: bool
) -> None:
    """Python ends with 1 then, the verdict of a divergence, and no program can help it."""
    monkeypatch.setattr(random.Random, "choice", lambda self, found: signal.SIGINT)
    monkeypatch.setattr(soak, "processes", lambda mark: [])
    monkeypatch.setattr(Run, "wait", lambda run, seconds: None)
    monkeypatch.setattr(soak.os, "kill", lambda pid, number: None)  # it ends by itself, as if it had come
    program = f"""
import os, shutil, sys
first = os.path.join(os.environ["TMPDIR"], "first")
if not os.path.exists(first):
    open(first, "w")
    sys.exit("{printed}")
os.remove(first)
shutil.copy(sys.argv[1], "r.json")
"""
    fake = Case("fake", (str(good),), 1, program=(sys.executable, "-c", program))
    outcome = Run(fake, 0, good.parent / "runs", seed=0).killed(expected_s=1.0)
    assert outcome.exit_code == 1
    assert any("exit 1 after SIGINT parent" in problem for problem in outcome.problems) == (not is_python)
