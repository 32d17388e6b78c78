"""``crossval doctor``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from crossval.cli import comparison as run
from crossval.engines import doctor
from crossval.engines.doctor import Check
from crossval.errors import BadInputError, UnavailableError
from crossval.reports import render

REFERENCES = ("bitnet.cpp library", "goldens (recorded bitnet.cpp)")
"""Names of the checks either of which gives a reference to compare with."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON on stdout.")
def command(as_json: bool) -> None:
    """Say what is installed, what is missing, and what to do about it.

    Exit 0 when engine and a reference (live or recorded) are usable, 3 when there is no reference, 4 when
    something is missing without which nothing works.

    \b
    Example:
      crossval doctor
    """
    checks = doctor.collect()
    code = exit_code(checks)
    if as_json:
        report = {"ok": code == 0, "checks": [asdict(check) for check in checks]}
        run.write_json(json.dumps(report, indent=1) + "\n")
    else:
        render.show_findings(render.console(), checks)
    raise click.exceptions.Exit(code)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 4 when something required is missing, 3 when no reference is there, else 0."""
    if not checks or any(check.required and not check.ok for check in checks):
        return BadInputError.exit_code
    if not any(check.ok for check in checks if check.name in REFERENCES):
        return UnavailableError.exit_code
    return 0
