"""The command group: what all commands share, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from bitnet_py.bus_error import explain_bus_errors
from crossval.cli.exits import BROKEN_PIPE, DEBUG_VARIABLE, INTERRUPTED, TERMINATED, of_error
from crossval.errors import BadInputError


class Group(click.Group):
    """A command group that never lets an exception escape as a traceback, unless ``--debug`` asks for it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program that owns the process."""
        explain_bus_errors()
        signal.signal(signal.SIGTERM, _terminate)
        return super().__call__(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn every exception into a line on stderr and an exit code."""
        if sys.stdout is None:
            fail(ctx, "stdout is closed: there is nowhere to print to", BadInputError.exit_code)
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # what is wrong with it is noticed here
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
            if debugging(ctx):
                traceback.print_exc()
            if isinstance(error, OSError) and error.filename is None:
                _drop_output()
            fail(ctx, *of_error(error))


class Terminated(BaseException):
    """SIGTERM: everything is left as by Ctrl-C, so that children, temporary files and locks go."""


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


def debugging(ctx: click.Context) -> bool:
    """Return whether tracebacks are wanted: ``--debug`` or ``CROSSVAL_DEBUG=1``."""
    return bool(ctx.find_root().params.get("debug")) or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="bitnet-parity", prog_name="crossval")
@click.option("--debug", is_flag=True, help="Print a traceback when something fails.")
def cli(debug: bool) -> None:
    """Find out which BitNet engine is wrong, and in which layer and operation.

    Compares a candidate engine with a reference (real bitnet.cpp, live or recorded), tap by tap or
    token by token, and writes receipts that CI can check.

    \b
    Exit codes: 0 parity or pass; 1 divergence or gate failure; 2 usage; 3 reference unavailable or
    coverage incomplete; 4 bad input (model, trace, receipt); 5 an engine crashed or timed out.

    \b
    Example:
      crossval layers --prompt "What is 2+2?"
    """
