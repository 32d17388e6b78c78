"""Threads of another process: whether they sleep, which of them work, where they run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from crossval.bench import threads

needs_proc = pytest.mark.skipif(not threads.can_place(), reason="needs /proc and sched_setaffinity: Linux")

SLEEPER = "import sys\nprint('up', flush=True)\nsys.stdin.read()"
SPINNER = "print('up', flush=True)\nwhile True: pass"
WORKER = """
import sys, threading
go = threading.Event()
def work():
    while go.wait():
        go.clear()
threading.Thread(target=work, daemon=True).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print('up', flush=True)
for line in sys.stdin:
    go.set()
    print('done', flush=True)
"""
Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    running = []

    def run(code: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        return child

    yield run
    for child in running:
        child.kill()
        child.communicate()


@needs_proc
def test_a_process_that_sleeps_is_settled_and_one_that_spins_is_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "SETTLE_S", 0.1)
    sleeper, spinner = start(SLEEPER), start(SPINNER)
    assert threads.settle([sleeper.pid, spinner.pid]) == [spinner.pid]
    assert threads.settle([]) == []


@needs_proc
def test_a_frozen_process_is_settled_until_it_is_thawed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SETTLE_S", 0.1)
    spinner = start(SPINNER)
    threads.freeze(spinner.pid)
    assert threads.settle([spinner.pid]) == []
    threads.thaw(spinner.pid)
    assert threads.settle([spinner.pid]) == [spinner.pid]
    spinner.kill()
    spinner.wait()
    threads.thaw(spinner.pid)  # gone already


@needs_proc
def test_a_spinning_thread_that_does_not_get_a_processor_is_not_taken_for_asleep(start: Start) -> None:
    spinner = start(SPINNER)
    assert threads.is_runnable(spinner.pid)
    threads.freeze(spinner.pid)
    time.sleep(0.05)
    assert not threads.is_runnable(spinner.pid)


def test_where_sleep_cannot_be_seen_there_is_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[float] = []
    monkeypatch.setattr(threads, "cpu_time_ns", lambda pid: None)
    monkeypatch.setattr(threads.time, "sleep", rested.append)
    assert threads.settle([1]) == []
    assert rested == [threads.REST_S]


@needs_proc
def test_cpu_time_is_that_of_all_threads(start: Start) -> None:
    spinner = start(SPINNER)
    before = threads.cpu_time_ns(spinner.pid)
    time.sleep(0.1)
    after = threads.cpu_time_ns(spinner.pid)
    assert before is not None
    assert after is not None
    assert after > before
    assert threads.cpu_time_ns(2**22 + 1) is None  # beyond the largest process id


@needs_proc
def test_the_threads_that_work_are_found_and_pinned(start: Start) -> None:
    child = start(WORKER)
    assert child.stdin is not None
    assert child.stdout is not None
    threads.settle([child.pid])
    before = threads.wakeups(child.pid)
    assert len(before) == 3
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"
    threads.settle([child.pid])
    found = threads.woken(before, threads.wakeups(child.pid))
    assert len(found) == 2
    assert found[0] == child.pid
    core = min(os.sched_getaffinity(0))
    threads.pin(found, [core, core])
    assert threads.is_pinned(found, [core, core])
    assert not threads.is_pinned(found, [core, core + 1])
    asleep = next(thread for thread in before if thread not in found)
    assert os.sched_getaffinity(asleep) == os.sched_getaffinity(0)
    child.kill()
    child.wait()
    assert not threads.is_pinned(found, [core, core])
    with pytest.raises(OSError, match="No such process"):
        threads.pin(found, [core, core])


def test_every_core_once_before_any_of_them_twice() -> None:
    assert threads.cores_first({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}) == [0, 1, 2, 3]
    assert threads.cores_first({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}) == [0, 2, 1, 3]
    assert threads.cores_first({5: "5", 4: "4"}) == [4, 5]
    assert sorted(threads.usable_cores()) == sorted(os.sched_getaffinity(0))
