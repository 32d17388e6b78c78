"""What the command lines have in common as programs: signals, closed pipes, full disks, exit codes of these."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

import click

from bitnet_py.bus_error import explain_bus_errors

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of click for every command."""
BAD_INPUT = 4
INTERRUPTED = 130
BROKEN_PIPE = 141
"""128 + SIGPIPE: the exit status of a program that the signal kills."""
TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM: everything is left as by Ctrl-C, so that children, temporary files and locks go."""


class Program(click.Group):
    """A command group of which every failure is one line and an exit code; never 1, which is a verdict."""

    def explain(self, ctx: click.Context, error: Exception) -> tuple[str, int] | None:
        """Return message and exit code of an exception; None: it is a bug, and shown as one."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program that owns the process."""
        explain_bus_errors()
        signal.signal(signal.SIGTERM, _terminate)
        return super().__call__(*args, **kwargs)

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
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            fail(ctx, "interrupted", INTERRUPTED)
        except Terminated:
            fail(ctx, "terminated", TERMINATED)
        except BrokenPipeError:
            _drop_output()
            ctx.exit(BROKEN_PIPE)
        except Exception as error:
            known = self.explain(ctx, error)
            if isinstance(error, OSError) and error.filename is None:
                _drop_output()
            if known is None:
                raise
            fail(ctx, *known)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _drop_output() -> None:
    """Let what is left in stdout's buffer go nowhere: Python would report its failure once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """Print ``error: ...`` on stderr (an engine's log tail may follow in further lines) and exit."""
    click.echo(f"error: {message}", err=True)
    ctx.exit(exit_code)
