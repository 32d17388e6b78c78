"""The signals that end a program, and what remembers that one came; standard library only.

A library may make something else of the exception that a signal raises: another exception, or a wrong
answer. What follows from that is no result.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn


class Terminated(BaseException):
    """SIGTERM: everything is left as by Ctrl-C, so that children, temporary files and locks go."""


class Stop(NamedTuple):
    """What a signal that ends a program does."""

    raises: type[BaseException]
    said: str
    exit_code: int


STOPS = {
    signal.SIGINT: Stop(KeyboardInterrupt, "interrupted", 130),
    signal.SIGTERM: Stop(Terminated, "terminated", 143),
}
_received: list[Stop] = []


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Let the signals stop what runs within, but Ctrl-C only where it would: not where it is ignored."""
    before = {number: signal.getsignal(number) for number in STOPS}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        signal.signal(signal.SIGTERM, _stop)
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if handler is not None:  # None: not Python's own
                signal.signal(number, handler)


def forget_stops() -> None:
    """Begin anew: another program may run in this process."""
    _received.clear()


def stop_of(error: BaseException | None = None) -> Stop | None:
    """Return the first signal that came, or that an exception stands for."""
    if _received:
        return _received[0]
    return next((stop for stop in STOPS.values() if isinstance(error, stop.raises)), None)


def stop_if_asked() -> None:
    """Raise again what a signal raised, after something that may have made something else of it."""
    if _received:
        raise _received[0].raises


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Say nothing of what is lost in a callback once a signal has come: its exception, most likely."""
    if not _received:
        sys.__unraisablehook__(unraisable)


def _stop(number: int, frame: object) -> NoReturn:
    _received.append(STOPS[signal.Signals(number)])
    raise _received[-1].raises
