"""The ``crossval`` command: one module per subcommand over the functions of ``crossval``."""

from crossval.cli.app import cli

main = cli
"""Entry point of the console script."""

__all__ = ["cli", "main"]
