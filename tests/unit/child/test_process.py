"""Whatever the child process does, the harness gets an exception that states it, and survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from crossval.bitnet_cpp import limits as cpp_limits
from crossval.bitnet_cpp.runner import BitnetCppRunner, open_library, start_child
from crossval.child.process import ChildProcess
from crossval.errors import BadInputError, CrossvalError, EngineCrashError, UnavailableError

ROOT = Path(__file__).resolve().parents[3]
PRELUDE = """
import os, sys, time, signal
sys.path.insert(0, ROOT)
request, response, lifeline = map(int, sys.argv[1:])
"""
SPEAKS_FRAMES = """
from crossval.child import protocol as cpp_protocol
def answer(**header):
    frame = cpp_protocol.read_frame(request)
    cpp_protocol.write_frame(response, header, frame.arrays)
"""


@pytest.fixture
def fake(tmp_path):
    """Return ``fake(code) -> ChildProcess`` running that code as the child."""
    children = []

    def start(code: str) -> ChildProcess:
        script = tmp_path / f"fake{len(children)}.py"
        script.write_text(PRELUDE.replace("ROOT", repr(str(ROOT))) + textwrap.dedent(code))
        child = ChildProcess("fake engine", [sys.executable, str(script)])
        children.append(child)
        return child

    yield start
    for child in children:
        child.close()


def ask(child: ChildProcess, timeout_s: float = 20.0):
    return child.request(
        "work", {"n": 1}, {"x": np.arange(3, dtype=np.int32)}, what="the work", timeout_s=timeout_s
    )


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def test_an_answer_comes_back_with_its_arrays(fake):
    child = fake(SPEAKS_FRAMES + "answer(ok=True, result={'a': 1})\nos.read(request, 1)\n")
    frame = ask(child)
    assert frame.header == {"a": 1}
    assert frame.arrays["x"].tolist() == [0, 1, 2]


def test_garbage_instead_of_a_frame_is_a_crash_of_the_engine(fake):
    child = fake("os.read(request, 4); os.write(response, b'llama: ok ' * 20); time.sleep(60)")
    with pytest.raises(EngineCrashError, match="malformed answer during the work"):
        ask(child)
    assert not is_alive(child.pid)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_signal_is_named_and_the_end_of_the_log_is_shown(fake, number):
    child = fake(f"""
        for i in range(50): print("noise", i, file=sys.stderr)
        print("ggml.c:123: GGML_ASSERT(false) failed", file=sys.stderr, flush=True)
        print("/some/where/libggml.so(ggml_abort+0xb5)[0x7f0000000001]", file=sys.stderr, flush=True)
        os.read(request, 1)
        os.kill(os.getpid(), {int(number)})
    """)
    with pytest.raises(EngineCrashError) as caught:
        ask(child)
    message = str(caught.value)
    assert f"{number.name} (signal {int(number)}) during the work" in message
    assert "GGML_ASSERT(false) failed" in message
    assert "libggml.so(" not in message
    assert "noise 0\n" not in message


def test_an_exit_status_is_named_and_an_empty_log_too(fake):
    with pytest.raises(EngineCrashError, match=r"exited with status 3 during the work; its log is empty"):
        ask(fake("sys.exit(3)"))


@pytest.mark.parametrize("reply", ["", "os.write(response, b'BXF1' + b'\\\\0' * 3)"])
def test_silence_and_half_a_frame_time_out_and_the_child_is_killed(fake, reply):
    child = fake(f"{reply}\ntime.sleep(60)")
    started = time.monotonic()
    with pytest.raises(EngineCrashError, match=r"timed out after 0\.3 s"):
        ask(child, timeout_s=0.3)
    assert time.monotonic() - started < 10
    assert not is_alive(child.pid)


def test_after_a_failure_every_request_says_so(fake):
    child = fake("sys.exit(3)")
    with pytest.raises(EngineCrashError):
        ask(child)
    with pytest.raises(EngineCrashError, match="closed after an earlier failure: exited with status 3"):
        ask(child)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("bad_input", BadInputError),
        ("unavailable", UnavailableError),
        ("refused", EngineCrashError),
        ("internal", EngineCrashError),
        ("nonsense", EngineCrashError),
    ],
)
def test_a_reported_failure_becomes_its_exception(fake, kind, error):
    child = fake(SPEAKS_FRAMES + f"answer(ok=False, kind={kind!r}, message='so and so')\nos.read(request, 1)\n")
    with pytest.raises(CrossvalError, match="so and so") as caught:
        ask(child)
    assert type(caught.value) is error


def test_closing_ends_a_child_that_ignores_its_pipes(fake, monkeypatch):
    monkeypatch.setattr("crossval.child.process._EXIT_GRACE_S", 0.2)
    child = fake("time.sleep(60)")
    child.close()
    assert not is_alive(child.pid)


def test_a_missing_program_is_unavailable():
    with pytest.raises(UnavailableError, match="cannot start"):
        ChildProcess("fake engine", ["/nonexistent/program"])


def test_no_file_descriptors_are_leaked(fake):
    fake("sys.exit(0)").close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        child = fake("sys.exit(0)")
        with pytest.raises(EngineCrashError):
            ask(child)
        child.close()
    assert len(os.listdir("/proc/self/fd")) == before


def limits_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return {line[:26].strip(): line[26:47].strip() for line in lines}


def test_the_real_child_runs_with_a_large_stack_and_no_core_files():
    with start_child() as child:
        assert wait_until(lambda: limits_of(child.pid)["Max stack size"] == str(cpp_limits.STACK_BYTES))
        assert limits_of(child.pid)["Max core file size"] == "0"
        # the limits are set before the child's program starts, and while it starts it has no environment
        wanted = f"OMP_STACKSIZE={cpp_limits.STACK_BYTES // 1024}K".encode()
        assert wait_until(lambda: wanted in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0"))


def test_the_real_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with start_child() as child, pytest.raises(EngineCrashError, match="unknown command 'work'"):
        ask(child)


def test_the_real_child_reports_an_unknown_command():
    with start_child() as child, pytest.raises(EngineCrashError, match="unknown command 'work'"):
        ask(child)


def test_the_real_child_does_not_outlive_a_killed_harness():
    code = """
        import time
        from crossval.bitnet_cpp.runner import start_child
        child = start_child()
        print(child.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not is_alive(pid))


def test_a_busy_child_ends_when_its_lifeline_does(fake):
    child = fake("""
        import threading
        from crossval.child.serve import live_with_parent
        live_with_parent(lifeline)
        os.write(2, b"started")
        while True: time.sleep(1)
    """)
    assert wait_until(lambda: "started" in child.log_tail())
    os.close(child._lifeline_fd)
    child._lifeline_fd = -1
    assert wait_until(lambda: not is_alive(child.pid))


@pytest.mark.parametrize("stack", [8 << 20, 64 << 20])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_batch_of_the_limit_fits_the_stack_and_one_twice_as_long_does_not(stack, n_threads):
    rows = 6912
    limit = cpp_limits.max_ubatch(stack, [2560, 640, rows], n_threads)
    share = 4 * -(-rows // n_threads)
    assert limit * share < stack
    assert 2 * limit * share > stack


def test_the_usual_stack_is_too_small_for_a_2b_batch_and_ours_is_not():
    """bitnet.cpp died with one thread and 512 tokens of this shape on 8 MiB."""
    assert cpp_limits.max_ubatch(8 << 20, [6912], 1) < 512
    assert cpp_limits.max_ubatch(cpp_limits.STACK_BYTES, [6912], 1) > 512
    assert cpp_limits.max_ubatch(1 << 20, [6912], 1) == 0


def test_what_is_not_a_libllama_is_unavailable(tmp_path):
    text = tmp_path / "libllama.so"
    text.write_text("not a library")
    with pytest.raises(BadInputError, match="is not a shared library"):
        open_library(text)
    with pytest.raises(UnavailableError, match="no such"):
        open_library(tmp_path / "missing.so")


def test_another_library_is_unavailable_and_says_what_it_is_not():
    other = np._core._multiarray_umath.__file__ if hasattr(np, "_core") else np.core._multiarray_umath.__file__
    with pytest.raises(UnavailableError, match="is not a libllama"):
        open_library(Path(other))


def test_a_model_that_is_none_is_bad_input_before_any_process_starts(tmp_path):
    for path, complaint in (
        (tmp_path / "missing.gguf", "cannot read"),
        (tmp_path / "text.gguf", "not a GGUF file"),
    ):
        if "text" in path.name:
            path.write_text("hello")
        with pytest.raises(BadInputError, match=complaint), BitnetCppRunner(path):
            pass


def test_a_runner_that_was_not_entered_says_so(tmp_path):
    with pytest.raises(EngineCrashError, match="has not been entered"):
        BitnetCppRunner(tmp_path / "model.gguf").reset()
    with pytest.raises(BadInputError, match="at least 1"):
        BitnetCppRunner(tmp_path / "model.gguf", n_threads=0)
