"""The ``crossval`` command: one module per subcommand; exit codes in ``crossval.cli.app``."""

from crossval.cli import bench, diff, doctor, gate, greedy, layers, metamorphic, record, selftest, smoke, triage
from crossval.cli.app import cli

main = cli
"""Entry point of the console script."""

for _module in (triage, layers, greedy, smoke, diff, record, gate, metamorphic, bench, selftest, doctor):
    cli.add_command(_module.command)

__all__ = ["cli", "main"]
