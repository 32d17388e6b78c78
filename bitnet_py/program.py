"""What the command lines have in common as programs: signals, closed pipes, full disks, exit codes of these."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, NoReturn

import click

from bitnet_py.bus_error import explain_bus_errors
from bitnet_py.stops import forget_stops, stop_if_asked, stop_of, stopping

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of click for every command."""
BAD_INPUT = 4
BROKEN_PIPE = 141
"""128 + SIGPIPE: the exit status of a program that the signal kills."""


class Program(click.Group):
    """A command group of which every failure is one line and an exit code; never 1, which is a verdict."""

    def explain(self, ctx: click.Context, error: Exception) -> tuple[str, int] | None:
        """Return message and exit code of an exception; None: it is a bug, and shown as one."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program that owns the process."""
        explain_bus_errors()
        try:
            with stopping():
                return super().__call__(*args, **kwargs)
        except BaseException as error:
            if (stop := stop_of(error)) is not None:
                raise SystemExit(stop.exit_code) from None
            raise
        finally:
            forget_stops()

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments, which prints the help where it is asked for."""
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError:
            _drop_output()
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            stop_if_asked()
            known = self.explain(click.Context(self), error)
            if known is None:
                raise
            fail(click.Context(self), *known)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what is wrong with its output is noticed here, not when Python ends."""
        if sys.stdout is None:
            fail(ctx, "stdout is closed: there is nowhere to print to", BAD_INPUT)
        try:
            try:
                result = super().invoke(ctx)
            finally:
                sys.stdout.flush()
            stop_if_asked()
            return result
        except BaseException as error:
            if isinstance(error, click.Abort):
                error = KeyboardInterrupt()
            if (stop := stop_of(error)) is not None:
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


def _drop_output() -> None:
    """Let what is left in stdout's buffer go nowhere: Python would report its failure once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """Print ``error: ...`` on stderr (an engine's log tail may follow in further lines) and exit."""
    click.echo(f"error: {message}", err=True)
    ctx.exit(exit_code)
