"""The child's side of an engine in its own process; ``crossval.child.process`` is the other side.

Its arguments are the file descriptors of three pipes from the harness: requests, responses,
lifeline. Standard output and error are a log file, because engines print. A request is a frame
``{"command": ..., ...}``; the answer is ``{"ok": true, "result": ...}`` or
``{"ok": false, "kind": ..., "message": ...}``. The process ends when the harness closes its pipes
or dies.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from bitnet_py.bus_error import explain_bus_errors
from crossval.child.protocol import Frame, PeerClosedError, read_frame, write_frame

Handle = Callable[[Frame], tuple[Any, dict[str, Any]]]
"""Handles a request; returns the answer's result and arrays."""
Kinds = tuple[tuple[type[Exception], str], ...]
"""Kind of error that an answer states for each exception; any other is ``internal``."""


def serve(fds: Sequence[int], handle: Handle, kinds: Kinds) -> None:
    """Answer requests until the harness closes its pipe; ``fds``: requests, responses, lifeline."""
    request_fd, response_fd, lifeline_fd = fds
    live_with_parent(lifeline_fd)
    while True:
        try:
            answer, arrays = _answer(read_frame(request_fd), handle, kinds)
            write_frame(response_fd, answer, arrays)
        except PeerClosedError:
            return


def live_with_parent(lifeline_fd: int) -> None:
    """Let the harness alone decide when this process ends: Ctrl-C reaches the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    explain_bus_errors()
    threading.Thread(target=_exit_with_parent, args=(lifeline_fd,), daemon=True).start()


def _exit_with_parent(lifeline_fd: int) -> None:
    """Wait until the harness is gone: it alone holds the other end of this pipe and never writes."""
    while os.read(lifeline_fd, 1):
        pass
    os._exit(0)


def _answer(request: Frame, handle: Handle, kinds: Kinds) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        result, arrays = handle(request)
        return {"ok": True, "result": result}, arrays
    except Exception as error:
        kind = next((name for cls, name in kinds if isinstance(error, cls)), "internal")
        if kind == "internal":
            traceback.print_exc()
        return {"ok": False, "kind": kind, "message": str(error) or type(error).__name__}, {}
