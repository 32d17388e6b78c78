"""``crossval engines``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from rich.console import Console
from rich.text import Text

from crossval.cli.options import COLOR
from crossval.cli.output import screen, write_json
from crossval.console import new_table, plain, show_line
from crossval.engines import available
from crossval.engines.available import Available
from crossval.errors import UnavailableError

COLUMNS = ("engine", "state", "arithmetic", "build")


@click.command("engines")
@click.option("--json", "as_json", is_flag=True, help="Print every engine as JSON on stdout.")
@COLOR
def command(as_json: bool) -> None:
    """List the engines that can be compared here, with build and arithmetic, or why one cannot be.

    The first column is what `--candidate` and `--reference` take. Libraries are loaded, each in a
    child process, and judged by their behaviour. Exit 0 when an engine besides the specification
    can be run, else 3.

    \b
    Example:
      crossval engines
    """
    found = available.collect()
    code = exit_code(found)
    if as_json:
        report = {"ok": code == 0, "engines": [one.to_json() for one in found]}
        write_json(json.dumps(report, indent=1) + "\n")
    else:
        show_engines(screen(), found)
    raise click.exceptions.Exit(code)


def exit_code(found: Sequence[Available]) -> int:
    """Return 0 when an engine besides the specification can be run, else 3."""
    live = any(one.ok and not one.recorded and one.word != "spec" for one in found)
    return 0 if live else UnavailableError.exit_code


def show_engines(out: Console, found: Sequence[Available]) -> None:
    """Print one line per engine or build, then where it is, or why it cannot be used."""
    table = new_table()
    for name in COLUMNS:
        table.add_column(name, no_wrap=name == "engine", overflow="fold")
    for one in found:
        table.add_row(plain(one.word), _state(one), plain(_arithmetic(one)), plain(_build(one)))
    out.print(table)
    for one in found:
        text = one.why_not or "; ".join(part for part in (one.detail, one.where) if part)
        show_line(out, f"{one.word}: {one.what}: {text}")


def _state(one: Available) -> Text:
    if not one.ok:
        return Text("not here", "bold red")
    return Text("recorded" if one.recorded else "live", "green")


def _arithmetic(one: Available) -> str:
    return "-" if one.numerics is None else ", ".join(one.numerics.words()) or "unknown"


def _build(one: Available) -> str:
    facts = [
        one.version and f"version {one.version}",
        one.source_commit and f"commit {one.source_commit[:12]}",
        one.library_digest and f"library {one.library_digest[:12]}",
        one.compiler,
    ]
    return ", ".join(fact for fact in facts if fact) or "-"
