"""The harness's exceptions, each with the process exit code it maps to (see docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_py.errors import printable


class CrossvalError(Exception):
    """Root of all errors raised by ``crossval``. ``exit_code`` is what the command line exits with."""

    exit_code = 4


class UsageError(CrossvalError):
    """The request contradicts itself (exit 2)."""

    exit_code = 2


class BadInputError(CrossvalError):
    """A model, trace or receipt is missing, malformed or does not belong to the others (exit 4).

    The message is one line, whatever a file holds that it shows.
    """

    exit_code = 4

    def __str__(self) -> str:
        """Return the message."""
        return printable(super().__str__())


class UnavailableError(CrossvalError):
    """The reference asked for is not available, or coverage is incomplete (exit 3)."""

    exit_code = 3
    receipt: Mapping[str, Any] | None = None
    """The ``incomplete`` receipt that states it, when a function of ``crossval.api`` made one."""


class EngineCrashError(CrossvalError):
    """An engine crashed, aborted or timed out; the message carries the tail of its log (exit 5)."""

    exit_code = 5
