"""One cell, run in a process of its own: what it was asked, and what came of it. Also what a Dask worker runs."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crossval.child.command import child_command

MAX_MESSAGE = 500
_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


class Outcome(NamedTuple):
    """How a cell's command ended: its exit code, what it printed (the receipt), and its last word on stderr."""

    exit_code: int
    printed: bytes
    message: str


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> Outcome:
    """Run ``crossval`` with these arguments, and variables set beside this process's own; waits for it."""
    with subprocess.Popen(
        [*child_command("crossval.cli"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    ) as process:
        with _lock:
            _running.add(process)
        try:
            printed, said = process.communicate()
        except BaseException:
            process.kill()
            raise
        finally:
            with _lock:
                _running.discard(process)
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    return Outcome(process.returncode, printed, told.removeprefix("error: ")[:MAX_MESSAGE])


def stop() -> None:
    """Terminate every cell that runs in this process."""
    with _lock:
        for process in _running:
            process.terminate()
