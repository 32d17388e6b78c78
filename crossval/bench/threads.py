"""The threads of an engine's process, seen from outside: whether they sleep, which of them work, on which core.

Everything here is Linux; elsewhere ``can_place`` is false, and ``settle`` waits for a fixed time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

REST_S = 0.3
"""How long to wait where sleep cannot be seen: OpenMP workers of bitnet.cpp spin for 0.2 s after a pass."""
SETTLE_S = 1.0
"""A process that still computes after this long will not stop by itself."""
POLL_S = 0.005


def can_place() -> bool:
    """Return whether this system lets one process place the threads of another."""
    return hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()


def usable_cores() -> list[int]:
    """Return the processors this process may use: one of every core first, then the cores' other threads."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return cores_first({core: _siblings(core) for core in os.sched_getaffinity(0)})


def cores_first(siblings: Mapping[int, str]) -> list[int]:
    """Return processors so that none shares a core with an earlier one as long as there are other cores.

    ``siblings``: processor -> text that is the same for all processors of its core.
    """
    seen: dict[str, int] = {}
    turn = {}
    for core in sorted(siblings):
        turn[core] = seen.get(siblings[core], 0)
        seen[siblings[core]] = turn[core] + 1
    return sorted(siblings, key=lambda core: (turn[core], core))


def _siblings(core: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(core)


def cpu_time_ns(pid: int) -> int | None:
    """Return the CPU time of all threads of a process; None where it cannot be read."""
    if not Path("/proc/self/task").is_dir():
        return None
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)  # CPUCLOCK_SCHED of the process: clock_getcpuclockid(3)
    except OSError:
        return None


def is_runnable(pid: int) -> bool:
    """Return whether a thread of a process computes, or would if a processor were free."""
    return any(text.rpartition(")")[2].split()[0] == "R" for text in _of_threads(pid, "stat").values())


def wakeups(pid: int) -> dict[int, int]:
    """Return thread id -> how often the thread has stopped running: it stays the same while a thread sleeps."""
    return {
        thread: sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)
        for thread, text in _of_threads(pid, "status").items()
    }


def _of_threads(pid: int, name: str) -> dict[int, str]:
    """Return thread id -> the contents of its file ``name`` in ``/proc``."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        try:
            found[int(path.parent.name)] = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            continue  # the thread has ended
    return found


def woken(before: Mapping[int, int], after: Mapping[int, int]) -> list[int]:
    """Return the threads of two readings of ``wakeups`` that ran in between."""
    return sorted(thread for thread, n in after.items() if n != before.get(thread, n))


def pin(threads: Sequence[int], cores: Sequence[int]) -> None:
    """Let each thread run on one core only, the first on the first.

    Raises:
        OSError: a thread has ended, or the system does not allow it.
    """
    for thread, core in zip(threads, cores, strict=True):
        os.sched_setaffinity(thread, {core})


def is_pinned(threads: Iterable[int], cores: Iterable[int]) -> bool:
    """Return whether each thread still exists and may run on its core only."""
    try:
        return all(os.sched_getaffinity(thread) == {core} for thread, core in zip(threads, cores, strict=True))
    except OSError:
        return False


def settle(pids: Collection[int]) -> list[int]:
    """Wait until all threads of these processes sleep; return those that compute even after ``SETTLE_S``."""
    if not pids:
        return []
    before = {pid: cpu_time_ns(pid) for pid in pids}
    if None in before.values():
        time.sleep(REST_S)
        return []
    busy = list(pids)
    for _ in range(round(SETTLE_S / POLL_S)):
        time.sleep(POLL_S)
        now = {pid: cpu_time_ns(pid) for pid in pids}
        busy = [pid for pid in pids if now[pid] != before[pid] or is_runnable(pid)]
        if not busy:
            break
        before = now
    return busy


def freeze(pid: int) -> None:
    """Stop all threads of a process until ``thaw``."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let a process go on, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
