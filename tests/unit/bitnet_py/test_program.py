"""Both command lines as programs: closed pipes, signals before anything is imported, versions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitnet_py.cli import main as bitnet
from crossval.cli import main as crossval

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
    while not note.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-number, b"", b"")
