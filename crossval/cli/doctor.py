"""``crossval doctor``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.text import Text

from crossval.cli.options import COLOR
from crossval.cli.output import screen, write_json
from crossval.console import new_table, plain, show_line
from crossval.engines import doctor
from crossval.engines.doctor import PartCheck
from crossval.errors import BadInputError, UnavailableError


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON on stdout.")
@COLOR
def command(as_json: bool) -> None:
    """Report what is installed, what is missing, and what to do about it.

    Exit 0 when the engine and a reference (live or recorded) are usable, 3 when there is no
    reference, 4 when a required part is missing.

    \b
    Example:
      crossval doctor
    """
    checks = doctor.collect()
    code = exit_code(checks)
    if as_json:
        report = {"ok": code == 0, "checks": [asdict(check) for check in checks]}
        write_json(json.dumps(report, indent=1) + "\n")
    else:
        show_parts(screen(), checks)
    raise click.exceptions.Exit(code)


def exit_code(checks: Sequence[PartCheck]) -> int:
    """Return 4 when a required part is missing, 3 when there is no reference, else 0."""
    if not checks or any(check.required and not check.ok for check in checks):
        return BadInputError.exit_code
    if not any(check.ok and check.reference for check in checks):
        return UnavailableError.exit_code
    return 0


def show_parts(out: Console, checks: Sequence[PartCheck]) -> None:
    """Print the state of every part, and the remedy for those that are missing."""
    table = new_table()
    for name in ("part", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        state = Text("ok", "green") if check.ok else Text("MISSING" if check.required else "missing", "bold red")
        table.add_row(plain(check.name), state, plain(check.detail))
    out.print(table)
    for check in checks:
        if not check.ok and check.remedy:
            show_line(out, f"{check.name}: {check.remedy}")
