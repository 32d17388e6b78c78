"""The command group: what all commands share, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import os
import traceback

import click

from bitnet_py.program import CONTEXT, Program
from crossval.cli.exits import DEBUG_VARIABLE, of_error


class Group(Program):
    """The commands of ``crossval``: no exception escapes as a traceback, unless ``--debug`` asks for it."""

    def explain(self, ctx: click.Context, error: Exception) -> tuple[str, int] | None:
        """Return message and exit code of any exception."""
        if debugging(ctx):
            traceback.print_exc()
        return of_error(error)


def debugging(ctx: click.Context) -> bool:
    """Return whether tracebacks are wanted: ``--debug`` or ``CROSSVAL_DEBUG=1``."""
    return bool(ctx.find_root().params.get("debug")) or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="bitnet-parity", prog_name="crossval")
@click.option("--debug", is_flag=True, help="Print a traceback when something fails.")
def cli(debug: bool) -> None:
    """Find out which BitNet engine is wrong, and in which layer and operation.

    Compares a candidate engine with a reference (real bitnet.cpp, live or recorded), tap by tap or
    token by token, and writes receipts that CI can check.

    \b
    Exit codes: 0 parity, pass or only near ties; 1 divergence or gate failure; 2 usage; 3 reference
    unavailable or coverage incomplete; 4 bad input (model, trace, receipt); 5 an engine crashed or
    timed out; 130, 141, 143 ended by Ctrl-C, a closed pipe, SIGTERM.

    \b
    Example:
      crossval layers --prompt "What is 2+2?"
    """
