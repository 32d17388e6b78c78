"""The child process that runs bitnet.cpp; ``cpp_process`` starts it.

Its arguments are the file descriptors of three pipes from the harness: requests, responses, lifeline.
Standard output and error are a log file, because ggml prints. A request is a frame ``{"command": ..., ...}``; the
answer is ``{"ok": true, "result": ...}`` or ``{"ok": false, "kind": ..., "message": ...}``. The process ends when
the harness closes its pipes or dies.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from crossval.child import limits as cpp_limits

Handle = Callable[[Any], tuple[Any, dict[str, Any]]]
"""From a request's frame to the answer's result and arrays."""
Kinds = tuple[tuple[type[Exception], str], ...]
"""What each exception is called in an answer."""


def main(argv: list[str]) -> None:
    """Set the process limits, which takes a second start, then serve requests until the pipe ends."""
    request_fd, response_fd, lifeline_fd = (int(fd) for fd in argv)
    stack_bytes = cpp_limits.stack_in_force()
    if stack_bytes is None:
        _restart_with_limits((request_fd, response_fd, lifeline_fd))
    else:
        live_with_parent(lifeline_fd)
        _serve(request_fd, response_fd, stack_bytes)
    # Destructors of a library that may be broken have nothing to add.
    os._exit(0)


def _restart_with_limits(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.set_inheritable(fd, True)
    environment = dict(os.environ)
    cpp_limits.set_thread_stack(environment, cpp_limits.apply())
    # The child multiplies nothing with NumPy: no pool of idle threads, each with such a stack.
    environment["OPENBLAS_NUM_THREADS"] = "1"
    os.execve(sys.executable, sys.orig_argv, environment)


def live_with_parent(lifeline_fd: int) -> None:
    """Let the harness alone decide when this process ends: Ctrl-C reaches the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(lifeline_fd,), daemon=True).start()


def _exit_with_parent(lifeline_fd: int) -> None:
    """Wait until the harness is gone: it alone holds the other end of this pipe and never writes."""
    while os.read(lifeline_fd, 1):
        pass
    os._exit(0)


def _serve(request_fd: int, response_fd: int, stack_bytes: int) -> None:
    from crossval.bitnet_cpp.engine import Engine, RefusedError
    from crossval.errors import BadInputError, UnavailableError

    kinds: Kinds = (
        (BadInputError, "bad_input"),
        (UnavailableError, "unavailable"),
        (RefusedError, "refused"),
    )
    engine = Engine(stack_bytes)
    answer_requests(request_fd, response_fd, lambda request: _handle(engine, request), kinds)


def answer_requests(request_fd: int, response_fd: int, handle: Handle, kinds: Kinds) -> None:
    """Answer requests until the harness closes its pipe; an exception of none of ``kinds`` is ``internal``."""
    from crossval.child import protocol as cpp_protocol

    kinds = (*kinds, (Exception, "internal"))
    while True:
        try:
            request = cpp_protocol.read_frame(request_fd)
        except cpp_protocol.PeerClosedError:
            return
        arrays: dict[str, Any] = {}
        try:
            result, arrays = handle(request)
            answer = {"ok": True, "result": result}
        except Exception as error:
            kind = next(name for cls, name in kinds if isinstance(error, cls))
            if kind == "internal":
                traceback.print_exc()
            answer = {"ok": False, "kind": kind, "message": f"{error}" or type(error).__name__}
        try:
            cpp_protocol.write_frame(response_fd, answer, arrays)
        except cpp_protocol.PeerClosedError:
            return


def _handle(engine: Any, request: Any) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    header = request.header
    command = header.get("command")
    if command == "open":
        return engine.open(header["library"]), {}
    if command == "load":
        limits = {key: header[key] for key in ("n_ctx", "n_ubatch", "n_threads")}
        return engine.load(header["model"], **limits), {}
    if command == "tokenize":
        ids = engine.tokenize(header["text"], add_bos=header["add_bos"], parse_special=header["parse_special"])
        return {}, {"token_ids": np.array(ids, np.int32)}
    if command == "reset":
        return engine.reset(), {}
    if command == "eval_each":
        passes = [engine.eval([token], ()) for token in request.arrays["token_ids"].tolist()]
        logits = np.concatenate([one.logits for one in passes])
        return {"elapsed_s": [one.elapsed_s for one in passes]}, {"result_output": logits}
    if command == "eval":
        done = engine.eval(request.arrays["token_ids"].tolist(), header["select"])
        rows = {name: tap.rows for name, tap in done.taps.items() if tap.rows is not None}
        arrays = {name: tap.array for name, tap in done.taps.items()}
        result = {"elapsed_s": done.elapsed_s, "n_kv": done.n_kv, "rows": rows}
        return result, {**arrays, "result_output": done.logits}
    raise ValueError(f"unknown command {command!r}")
