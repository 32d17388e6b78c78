"""The ``crossval`` command: one module per subcommand over ``crossval.api``."""

from crossval.cli import (
    bench,
    diff,
    doctor,
    dumps,
    engines,
    fetch_model,
    gate,
    greedy,
    layers,
    metamorphic,
    record,
    report,
    score,
    selftest,
    sign,
    smoke,
    sweep,
    tokens,
    triage,
    weights,
)
from crossval.cli.app import cli

main = cli
"""Entry point of the console script."""

for _command in (
    triage.command,
    report.report,
    report.show,
    report.show_history,
    dumps.printed,
    dumps.import_dump,
):
    cli.add_command(_command)
for _module in (
    layers,
    greedy,
    smoke,
    diff,
    record,
    gate,
    sign,
    metamorphic,
    bench,
    selftest,
    tokens,
    score,
    sweep,
    weights,
    fetch_model,
    doctor,
    engines,
):
    cli.add_command(_module.command)

__all__ = ["cli", "main"]
