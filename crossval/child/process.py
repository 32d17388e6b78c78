"""The harness's side of the child process: start it, exchange frames, turn every failure into an error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

import numpy.typing as npt

from crossval.child.protocol import DeadlineError, Frame, PeerClosedError, ProtocolError, read_frame, write_frame
from crossval.errors import BadInputError, CrossvalError, EngineCrashError, UnavailableError

_TAIL_BYTES = 16 << 10
_TAIL_LINES = 12
_EXIT_GRACE_S = 5.0
_BACKTRACE_LINE = re.compile(r"^(\S+\([^()]*\)|\S+)\[0x[0-9a-f]+\]$")


class ChildProcess:
    """A child that answers frames; every failure becomes an exception of ``crossval.errors``.

    After ``EngineCrashError`` the child is gone and every further request raises the same error.
    """

    def __init__(self, engine: str, command: Sequence[str]) -> None:
        """Start the child: ``command``, with three file descriptors as further arguments.

        ``engine``: its name in messages. ``child_command`` (``child.command``) gives that of a module.

        Raises:
            UnavailableError: the program cannot be started.
        """
        self.engine = engine
        self._failure: str | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="crossval-", suffix=".log")  # noqa: SIM115  # closed with the child
        request_read, self._request_fd = os.pipe()
        self._response_fd, response_write = os.pipe()
        lifeline_read, self._lifeline_fd = os.pipe()
        os.set_blocking(self._request_fd, False)
        theirs = (request_read, response_write, lifeline_read)
        try:
            self._process = subprocess.Popen(
                [*command, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=theirs,
                env=_environment(),
            )
        except OSError as error:
            self._close_fds()
            self._log.close()
            raise UnavailableError(f"cannot start the process for {engine}: {error}") from error
        finally:
            for fd in theirs:
                os.close(fd)

    @property
    def pid(self) -> int:
        """Return the child's process id."""
        return self._process.pid

    def request(
        self,
        command: str,
        params: Mapping[str, Any] | None = None,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        what: str,
        timeout_s: float,
    ) -> Frame:
        """Send a command and return the answer; its ``header`` is the command's result.

        Raises:
            EngineCrashError: the child died, hung, sent a malformed answer or reported a failure of
            the engine.
            BadInputError, UnavailableError: from the child's own checks.
        """
        if self._failure is not None:
            raise EngineCrashError(f"{self.engine} is closed after an earlier failure: {self._failure}")
        deadline = time.monotonic() + timeout_s
        try:
            write_frame(self._request_fd, {"command": command, **(params or {})}, arrays, deadline=deadline)
            answer = read_frame(self._response_fd, deadline=deadline)
        except DeadlineError:
            raise self._fail(f"timed out after {timeout_s:g} s during {what}") from None
        except ProtocolError as error:
            raise self._fail(f"sent a malformed answer during {what} ({error})") from error
        except PeerClosedError:
            raise self._fail(f"{self._how_it_ended()} during {what}") from None
        except BaseException:
            # Interrupted in the middle of a frame: the pipe is out of sync.
            self._fail(f"was interrupted during {what}")
            raise
        if answer.header.get("ok") is True:
            result = answer.header.get("result")
            return Frame(result if isinstance(result, dict) else {}, answer.arrays)
        raise self._reported(answer.header, what)

    def _reported(self, header: Mapping[str, Any], what: str) -> CrossvalError:
        message = str(header.get("message", ""))
        kind = header.get("kind")
        if kind == "bad_input":
            return BadInputError(message)
        if kind == "unavailable":
            return UnavailableError(message)
        return self._fail(f"failed during {what}: {message}")

    def _fail(self, reason: str) -> EngineCrashError:
        self._stop(grace_s=0.0)
        self._failure = reason
        tail = self.log_tail()
        return EngineCrashError(
            f"{self.engine} {reason}" + (f"; end of its log:\n{tail}" if tail else "; its log is empty")
        )

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return "closed its connection but did not exit"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return f"exited with status {code}"

    def log_tail(self) -> str:
        """Return the last lines the child printed, without stack addresses; empty when there are none."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        lines = [line.rstrip() for line in data.decode("utf-8", "replace").splitlines()]
        kept = [line for line in lines if line.strip() and not _BACKTRACE_LINE.match(line)]
        return "\n".join(f"  {line[:300]}" for line in kept[-_TAIL_LINES:])

    def close(self) -> None:
        """End the child by closing its pipes; kill it if it does not exit."""
        self._stop(grace_s=_EXIT_GRACE_S)
        if self._failure is None:
            self._failure = "closed"
        self._log.close()

    def _stop(self, grace_s: float) -> None:
        self._close_fds()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_fds(self) -> None:
        for name in ("_request_fd", "_response_fd", "_lifeline_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _environment() -> dict[str, str]:
    # The child multiplies nothing with NumPy: spare it a pool of idle threads, each with a large stack.
    # ggml's abort starts gdb or lldb when it finds one: slow, and its output hides ggml's own message.
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PATH": os.devnull}


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
