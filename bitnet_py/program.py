"""What the command lines have in common as programs: signals, closed pipes, full disks, exit codes of these."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, NamedTuple, NoReturn

import click

from bitnet_py.bus_error import explain_bus_errors

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of click for every command."""
BAD_INPUT = 4
BROKEN_PIPE = 141
"""128 + SIGPIPE: the exit status of a program that the signal kills."""


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
"""Those that came. Whatever a library made of the exception, another one or a wrong answer, is no result."""


class Program(click.Group):
    """A command group of which every failure is one line and an exit code; never 1, which is a verdict."""

    def explain(self, ctx: click.Context, error: Exception) -> tuple[str, int] | None:
        """Return message and exit code of an exception; None: it is a bug, and shown as one."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program that owns the process."""
        explain_bus_errors()
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, _stop)
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            if _received:
                sys.exit(_received[0].exit_code)
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments, which prints the help where it is asked for."""
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError:
            _drop_output()
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what is wrong with its output is noticed here, not when Python ends."""
        if sys.stdout is None:
            fail(ctx, "stdout is closed: there is nowhere to print to", BAD_INPUT)
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BaseException as error:
            if (stop := _stop_of(error)) is not None:
                fail(ctx, stop.said, stop.exit_code)
            if isinstance(error, BrokenPipeError):
                _drop_output()
                ctx.exit(BROKEN_PIPE)
            if isinstance(error, click.ClickException | click.exceptions.Exit) or not isinstance(error, Exception):
                raise
            known = self.explain(ctx, error)
            if isinstance(error, OSError) and error.filename is None:
                _drop_output()
            if known is None:
                raise
            fail(ctx, *known)


def stop_if_asked() -> None:
    """Raise again what a signal raised, where something else may have come of it."""
    if _received:
        raise _received[0].raises


def _stop(number: int, frame: object) -> NoReturn:
    _received.append(STOPS[signal.Signals(number)])
    raise _received[-1].raises


def _stop_of(error: BaseException) -> Stop | None:
    """Return the first signal that came, or that an exception stands for."""
    if _received:
        return _received[0]
    if isinstance(error, click.Abort):
        return STOPS[signal.SIGINT]
    return next((stop for stop in STOPS.values() if isinstance(error, stop.raises)), None)


def _drop_output() -> None:
    """Let what is left in stdout's buffer go nowhere: Python would report its failure once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """Print ``error: ...`` on stderr (an engine's log tail may follow in further lines) and exit."""
    click.echo(f"error: {message}", err=True)
    ctx.exit(exit_code)
