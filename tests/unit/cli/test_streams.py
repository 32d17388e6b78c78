"""Odd files and streams: FIFOs, a full or closed stdout, signals, names that are too long, models cut short."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crossval.traces.read import Trace
from crossval.traces.write import _take_place_of
from tests.support.signals import send_once_there
from tests.support.strangers import PROMPT, error_line, run

ROOT = Path(__file__).parents[3]


def start(*words, module="crossval", **how):
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, **how)


def finish(process):
    """Return exit code and stderr of a process that must end by itself."""
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err.decode()


def terminated(code, note):
    """Return exit code and stderr of Python code that gets SIGTERM once it has written the file ``note``."""
    process = subprocess.Popen([sys.executable, "-c", code, note], stderr=subprocess.PIPE, cwd=ROOT)
    send_once_there(signal.SIGTERM, process, note)
    return finish(process)


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("gate", "r.json", "--policy"),
        ("gate",),
        ("greedy", "--prompts"),
        ("score", "--text"),
        ("smoke", "--suite"),
        ("layers", "--prompt", PROMPT, "--model"),
    ],
    ids=" ".join,
)
def test_a_fifo_without_a_writer_is_refused(words, fifo):
    result = run(*words, fifo)
    assert result.exit_code == 4
    assert "regular file" in error_line(result)


UNREADABLE = [
    ("gate", "r.json", "--policy"),
    ("gate",),
    ("greedy", "--prompts"),
    ("score", "--text"),
    ("smoke", "--suite"),
    ("tokens", "--corpus"),
    ("layers", "--prompt", PROMPT, "--model"),
    ("weights",),
]


@pytest.mark.parametrize("words", UNREADABLE, ids=" ".join)
@pytest.mark.parametrize("name", ["none", "x" * 300, "folder"])
def test_a_file_that_cannot_be_read_has_one_exit_code(words, name, tmp_path):
    (tmp_path / "folder").mkdir()
    result = run(*words, tmp_path / name)
    assert result.exit_code == 4, result.output
    error_line(result)


@pytest.mark.parametrize("option", ["--receipt", "--repro", "--reference", "--candidate"])
def test_a_name_that_is_too_long_is_bad_input(option, golden, model_path, tmp_path):
    words = ["layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden]
    result = run(*words, option, tmp_path / ("x" * 300))
    assert result.exit_code == 4, result.output
    assert "defect" not in result.stderr
    assert "bug in crossval" not in result.stderr


def test_a_full_disk_behind_stdout_is_not_a_bug(golden, model_path):
    words = ("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden)
    for more in (("--quiet",), ("--quiet", "--json")):
        with Path("/dev/full").open("wb") as full:
            code, err = finish(start(*words, *more, stdout=full))
        assert (code, err) == (4, "error: cannot write the output: No space left on device\n")


def test_a_closed_stdout_is_said_before_any_work():
    process = start("gate", "none.json", preexec_fn=lambda: os.close(1))
    assert finish(process) == (4, "error: stdout is closed: there is nowhere to print to\n")


@pytest.mark.parametrize(("module", "words"), [("crossval", ("engines",)), ("bitnet_py", ("inspect",))])
def test_a_reader_that_stops_reading_ends_the_program_quietly(module, words):
    """As ``| head`` does; never exit 1, which is a divergence."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        code, err = finish(start(*words, module=module, stdout=write_end))
    finally:
        os.close(write_end)
    assert (code, err) == (141, "")


def test_the_engine_alone_says_that_stdout_is_full():
    with Path("/dev/full").open("wb") as full:
        code, err = finish(start("inspect", module="bitnet_py", stdout=full))
    assert (code, err) == (4, "error: cannot write the output: No space left on device\n")


TERMINATED = """
import sys, time
from pathlib import Path
import crossval
from crossval.cli import cli

def wait(*_, **__):
    try:
        Path(sys.argv[-1]).write_text("running")
        time.sleep(60)
    finally:
        Path(sys.argv[-1]).write_text("cleaned up")

crossval.record = wait
sys.argv[1:-1] = ["record", "--prompt", "x", "--out", "unused"]
cli(sys.argv[1:-1], prog_name="crossval")
"""


def test_sigterm_cleans_up(tmp_path):
    note = tmp_path / "note"
    assert terminated(TERMINATED, note) == (143, "error: terminated\n")
    assert note.read_text() == "cleaned up"


MISREAD = """
import sys, time
from pathlib import Path
from crossval.cli import cli
from crossval.receipts import file

def read(path):
    try:
        Path(sys.argv[1]).write_text("reading")
        time.sleep(60)
    except BaseException as error:
        raise ValueError(f"keyword: {type(error).__name__}") from None

file.read = read
cli(["gate", "a.json", "b.json"], prog_name="crossval")
"""


def test_the_gate_judges_no_file_after_a_signal(tmp_path):
    assert terminated(MISREAD, tmp_path / "note") == (143, "error: terminated\n")


CUT_SHORT = """
import os, sys
from bitnet_py.gguf import GGUFFile
from {program} import main

model = sys.argv[1]
opened = GGUFFile.open

def cut(path):
    gguf = opened(path)
    os.truncate(path, 4096)
    return gguf

GGUFFile.open = cut
main({words}, prog_name="x")
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("bitnet_py.cli", ["run", "--prompt", "x", "--max-tokens", "1"]),
        ("crossval.cli", ["layers", "--prompt", "x", "--reference", "spec"]),
    ],
)
def test_a_model_cut_short_while_it_is_read_is_said(program, words, model_path, tmp_path):
    model = tmp_path / "m.gguf"
    shutil.copy(model_path, model)
    code = CUT_SHORT.format(program=program, words=[*words, "--model", str(model)])
    process = subprocess.Popen([sys.executable, "-c", code, model], stderr=subprocess.PIPE, cwd=ROOT)
    code, err = finish(process)
    assert code == 4
    assert err.startswith("error: a mapped file lost pages while it was read (SIGBUS)")
    assert err.count("\n") == 1


def test_an_error_line_shows_control_characters_and_ends(tmp_path):
    result = run("gate", tmp_path / "a\nerror: b\x1b[31m")
    assert "a\\nerror: b\\x1b[31m" in error_line(result)
    result = run("gate", "y" * 5000)
    assert len(error_line(result)) <= 307
    assert error_line(result).endswith("File name too long")


def recorded(out, *more):
    return run(
        "record", "--engine", "bitnet_py", "--prompt", PROMPT, "--decode", "1", "--outline", "--out", out, *more
    )


def test_a_trace_that_is_replaced_stays_until_the_new_one_is_whole(model_path, tmp_path, monkeypatch):
    out = tmp_path / "trace"
    assert recorded(out, "--model", model_path).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path, tensors):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    for name in ("write_safetensors", "write_atomically"):
        with monkeypatch.context() as patched:
            patched.setattr(f"crossval.traces.write.{name}", full)
            failed = recorded(out, "--model", model_path, "--overwrite")
        assert failed.exit_code == 4
        assert "No space left on device" in error_line(failed)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["trace"]

    def interrupted(old, new):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("crossval.traces.write._take_place_of", interrupted)
        assert recorded(out, "--model", model_path, "--overwrite").exit_code == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    mode = out.stat().st_mode
    assert recorded(out, "--model", model_path, "--overwrite", "--decode", "2").exit_code == 0
    assert len(Trace.open(out).info.passes) == 3
    assert out.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_an_unfinished_trace_of_a_killed_command_can_be_overwritten(model_path, tmp_path):
    out = tmp_path / "trace"
    out.mkdir()
    for name in ("pass-0000.safetensors", "pass-0001.safetensors.part"):
        (out / name).write_bytes(b"part")
    (tmp_path / ".trace.abcd1234.crossval").mkdir()
    refused = recorded(out, "--model", model_path)
    assert refused.exit_code == 4
    assert "overwrite" in error_line(refused)
    assert recorded(out, "--model", model_path, "--overwrite").exit_code == 0
    assert Trace.open(out).info.passes
    assert not (out / "pass-0001.safetensors.part").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_names_are_exchanged_in_one_step_where_the_system_can(tmp_path, monkeypatch, can_exchange):
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.mkdir()
        (path / path.name).touch()
    steps = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append(names), replace(*names)))
    if not can_exchange:
        monkeypatch.setattr("crossval.traces.write._exchanged", lambda *_: False)
    _take_place_of(old, new)
    assert [path.name for path in old.iterdir()] == ["new"]
    assert (len(steps), new.exists()) == ((0, True) if can_exchange else (2, False))
