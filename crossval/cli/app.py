"""The command group: what all commands share, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import os
import pkgutil
import traceback
from collections.abc import Iterator, Mapping

import click

from bitnet_py.program import CONTEXT, Program
from crossval.cli.exits import DEBUG_VARIABLE, of_error

PLACES = {
    "triage": "crossval.cli.triage:command",
    "report": "crossval.cli.report:report",
    "show": "crossval.cli.report:show",
    "history": "crossval.cli.report:show_history",
    "printed": "crossval.cli.dumps:printed",
    "import-dump": "crossval.cli.dumps:import_dump",
    "layers": "crossval.cli.layers:command",
    "greedy": "crossval.cli.greedy:command",
    "smoke": "crossval.cli.smoke:command",
    "diff": "crossval.cli.diff:command",
    "record": "crossval.cli.record:command",
    "gate": "crossval.cli.gate:command",
    "sign": "crossval.cli.sign:command",
    "metamorphic": "crossval.cli.metamorphic:command",
    "bench": "crossval.cli.bench:command",
    "selftest": "crossval.cli.selftest:command",
    "tokens": "crossval.cli.tokens:command",
    "score": "crossval.cli.score:command",
    "sweep": "crossval.cli.sweep:command",
    "weights": "crossval.cli.weights:command",
    "fetch-model": "crossval.cli.fetch_model:command",
    "doctor": "crossval.cli.doctor:command",
    "engines": "crossval.cli.engines:command",
}
"""Command -> where it is, ``module:name``; in the order of the documentation."""


class Commands(Mapping[str, click.Command]):
    """The subcommands, each imported when it is asked for: one command must not load the others."""

    def __getitem__(self, name: str) -> click.Command:
        """Return a command, or raise KeyError."""
        command: click.Command = pkgutil.resolve_name(PLACES[name])
        return command

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(PLACES)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(PLACES)


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


@click.group(cls=Group, commands=Commands(), context_settings=CONTEXT)
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
