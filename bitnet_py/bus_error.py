"""What a process says when a mapped file was cut short while it reads: SIGBUS would end it without a word.

A file that is mapped can lose its pages at any time: somebody truncates or replaces it in place, a disk or
a network share fails. The system then ends the process that reads them.
"""

from __future__ import annotations

import ctypes
import os
import signal

EXIT_STATUS = 4
"""Bad input."""
MESSAGE = (
    b"error: a mapped file lost pages while it was read (SIGBUS): the model or a trace was truncated or replaced "
    b"in place, or its disk failed; run again with a complete file\n"
)
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _end(number: int) -> None:
    # The read that failed cannot be finished, and Python's own handlers would wait for it.
    os.write(2, MESSAGE)
    os._exit(EXIT_STATUS)


_handler = _Handler(_end)
"""Kept alive: the system holds no reference."""


def explain_bus_errors() -> None:
    """Let SIGBUS end this process with a line on stderr and exit status 4; for programs, not for libraries."""
    if os.name == "posix":
        handle = ctypes.CDLL(None).signal
        handle.argtypes, handle.restype = [ctypes.c_int, _Handler], ctypes.c_void_p
        handle(signal.SIGBUS, _handler)
