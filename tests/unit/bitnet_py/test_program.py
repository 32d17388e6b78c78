"""Both command lines as programs: closed pipes, signals before anything is imported, versions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bitnet_py.cli import main as bitnet
from bitnet_py.program import Program
from bitnet_py.stops import STOPS
from crossval.cli import main as crossval
from tests.support.signals import send_once_there

ROOT = Path(__file__).parents[3]
PROGRAMS = {"bitnet": ("bitnet_py", bitnet), "crossval": ("crossval", crossval)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_states_its_version(name):
    result = CliRunner().invoke(PROGRAMS[name][1], ["--version"])
    assert (result.exit_code, result.output) == (0, f"{name}, version {version('bitnet-parity')}\n")


class Closed:
    """A stdout whose reader is gone."""

    encoding = "utf-8"
    errors = "strict"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def fileno(self):
        raise OSError


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["tokens", "--help"], []])
def test_a_help_that_nobody_reads_to_its_end_is_no_failure(name, words, monkeypatch, capsys):
    """``crossval --help | head -1``: click alone would exit with 1, which is a divergence."""
    program = PROGRAMS[name][1]
    words = ["tokenize" if word == "tokens" and name == "bitnet" else word for word in words]
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as end:
        program.main(words, prog_name=name)
    assert end.value.code in (141, 2 if not words else 141)


FIRST_IMPORT = """
import pathlib, time
pathlib.Path({note!r}).write_text("importing")
time.sleep(60)
"""


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_prints_no_traceback(name, number, tmp_path):
    note = tmp_path / "note"
    (tmp_path / "click.py").write_text(FIRST_IMPORT.format(note=str(note)))
    search = os.pathsep.join(map(str, (tmp_path, ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-m", PROGRAMS[name][0], "--help"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    send_once_there(number, process, note)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-number, b"", b"")


SWALLOWED = """
import pathlib, sys, time
import click
from bitnet_py.program import Program
from bitnet_py.stops import stop_if_asked

class Ignored:
    def __del__(self):
        raise KeyboardInterrupt

def ignored():
    Ignored()

def wait():
    try:
        pathlib.Path(sys.argv[1]).write_text("waiting")
        time.sleep(60)
    except BaseException:
        {becomes}

class Own(Program):
    def explain(self, ctx, error):
        return "a bug", 5

@click.group(cls=Own)
@click.option("--early", is_flag=True, callback=lambda ctx, param, value: value and wait())
def cli(early):
    pass

@cli.command()
def command():
    wait()

cli([*sys.argv[2:], "command"])
"""


def stopped(number, becomes, folder, *words):
    """Return exit code and stderr of a program that makes something else of a signal."""
    note = folder / "note"
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWED.format(becomes=becomes), note, *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    send_once_there(number, process, note)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "becomes",
    [
        "raise ValueError('keyword: KeyboardInterrupt')",
        "raise SystemExit(1)",
        "raise click.exceptions.Exit(1)",
        "raise click.UsageError('no such thing')",
        "stop_if_asked()",
        "pass",
        "ignored()",
    ],
)
def test_what_a_library_makes_of_a_signal_is_no_result(becomes, number, tmp_path):
    """jsonschema-rs makes a failed validation of it, ``__set_name__`` a RuntimeError, and 1 is a verdict."""
    said = {signal.SIGINT: (130, "error: interrupted\n"), signal.SIGTERM: (143, "error: terminated\n")}
    assert stopped(number, becomes, tmp_path) == said[number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("becomes", ["raise", "raise ValueError"])
def test_a_signal_before_the_command_begins_is_no_verdict(becomes, number, tmp_path):
    """Click alone would exit with 1."""
    code, err = stopped(number, becomes, tmp_path, "--early")
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in err
    assert "a bug" not in err


def test_ctrl_c_stays_ignored_where_it_is(tmp_path):
    """A job in the background of a script, or under ``nohup``."""
    code = SWALLOWED.format(becomes="raise").replace("sleep(60)", "sleep(0.5)")
    note = tmp_path / "note"
    process = subprocess.Popen(
        [sys.executable, "-c", code, note], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    send_once_there(signal.SIGINT, process, note)
    assert process.wait(timeout=60) == 0


def test_a_program_leaves_no_trace_in_the_process():
    """It may be called again, by a notebook for example."""

    @click.group(cls=Program)
    def cli():
        pass

    cli.command("stop")(lambda: signal.raise_signal(signal.SIGTERM))
    cli.command("go")(lambda: None)
    before = {number: signal.getsignal(number) for number in STOPS}
    for words, code in ((["stop"], 143), (["go"], 0)):
        with pytest.raises(SystemExit) as end:
            cli(words)
        assert end.value.code == code
        assert {number: signal.getsignal(number) for number in STOPS} == before


def test_what_fails_while_commands_are_loaded_is_one_line(tmp_path):
    environment = {**os.environ, "BITNET_LIBRARY": str(tmp_path / "none.so")}
    command = [sys.executable, "-m", "crossval", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (ended.returncode, ended.stderr.count("\n")) == (4, 1)
    assert ended.stderr.startswith("error: ")
