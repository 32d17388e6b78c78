"""All commands: help, documentation, usage errors, and every way out of the program."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossval.cli import app, cli, docs
from crossval.engines import session
from crossval.errors import EngineCrashError, UnavailableError
from tests.support.strangers import PROMPT, error_line, run

ROOT = Path(__file__).parents[3]
COMMANDS = sorted(cli.commands)


def test_the_commands_of_the_contract_exist():
    assert {"layers", "greedy", "diff", "gate", "doctor", "record"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_documented_options(name):
    text = inspect.cleandoc(cli.commands[name].help or "")
    assert f"crossval {name}" in text.partition("Example:")[2]
    for param in cli.commands[name].params:
        assert param.param_type_name == "argument" or getattr(param, "help", None), param.name
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout


def test_the_documentation_is_current():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == docs.commands_markdown(), "renew with: python -m crossval.cli.docs > docs/commands.md"
    assert [name for name in COMMANDS if f"## crossval {name}\n" not in page] == []


@pytest.mark.parametrize(
    "words",
    [
        "layers",
        "layers --prompt x --threads 0",
        "layers --prompt x --decode -1",
        "layers --prompt x --template nope",
        "layers --prompt x --nope",
        "greedy",
        "greedy --prompt x --prompts y",
        "greedy --prompt x --steps 0",
        "diff one",
        "gate",
        "gate r.json --min-exact-match 2",
        "gate r.json --model-sha256 abc",
        "nope",
    ],
)
def test_usage_errors(words):
    result = run(*words.split())
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["layers", "greedy", "record"])
def test_empty_prompt(command, tmp_path):
    extra = ("--out", tmp_path / "t") if command == "record" else ()
    result = run(command, "--prompt", "", *extra)
    assert result.exit_code == 4
    assert "prompt is empty" in error_line(result)


@pytest.fixture
def raising(model_path, monkeypatch):
    """Return ``raising(error, *options)``: run a command in which opening the reference raises the error."""

    def command(error, *options, json=True):
        def leave(*_, **__):
            raise error

        monkeypatch.setattr(session, "open_reference", leave)
        words = ("layers", "--prompt", PROMPT, "--model", model_path)
        return run(*options, *words, *(["--json"] if json else []))

    return command


def test_a_crash_is_exit_5_and_keeps_the_log(raising):
    result = raising(EngineCrashError("the child died with SIGABRT\n  GGML_ASSERT failed"))
    assert result.exit_code == 5
    assert result.stderr == "error: the child died with SIGABRT\n  GGML_ASSERT failed\n"
    assert result.stdout == ""


def test_an_unexpected_exception_is_exit_5_without_a_traceback(raising, monkeypatch):
    result = raising(KeyError("surprise"))
    assert result.exit_code == 5
    assert "KeyError: 'surprise'" in error_line(result)
    result = raising(KeyError("surprise"), "--debug")
    assert result.exit_code == 5
    assert "Traceback" in result.stderr
    monkeypatch.setenv(app.DEBUG_VARIABLE, "1")
    assert "Traceback" in raising(KeyError("surprise")).stderr


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 5), (UnavailableError("x"), 3)]
)
def test_other_ways_out(error, code, raising):
    result = raising(error, json=False)
    assert result.exit_code == code
    error_line(result)


def process(model, golden, *options, **how):
    command = [sys.executable, "-m", "crossval", "layers", "--prompt", PROMPT, "--model", model]
    words = [*command, "--reference", golden, *options]
    return subprocess.run(list(map(str, words)), stderr=subprocess.PIPE, cwd=ROOT, timeout=60, **how)


def test_the_console_entry_as_a_process(model_path, golden):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = process(model_path, golden, "--quiet", stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"PARITY" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_a_reader_that_goes_away_is_no_verdict(model_path, golden):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = process(model_path, golden, "--json", stdout=write_end)
    finally:
        os.close(write_end)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
