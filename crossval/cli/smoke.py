"""``crossval smoke``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import click

import crossval
from crossval.cli import completion
from crossval.cli.options import ENGINES, count, receipt_command, which_engine
from crossval.receipts.file import Receipt
from crossval.smoke.answers import MinCorrect

SUITES = ("fixed", "long", "everyday", "FILE")


def _read_fraction(ctx: click.Context, param: click.Parameter, value: str) -> MinCorrect:
    """Parse a fraction above 0 and at most 1, written as ``7/10`` or ``0.7``."""
    whole = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value)
    found = None
    if whole is not None:
        found = MinCorrect(int(whole[1]), int(whole[2]))
    elif re.fullmatch(r"[01]?\.[0-9]{1,6}|1", value):
        found = MinCorrect(*Fraction(value).as_integer_ratio())
    if found is None or not 0 < found.correct <= found.of:
        raise click.BadParameter(f"{value!r}: expected a fraction above 0 and at most 1, such as 7/10 or 0.7")
    return found


@receipt_command(
    "smoke",
    click.option(
        "--suite",
        default="fixed",
        show_default=True,
        metavar="|".join(SUITES),
        shell_complete=completion.of_words(SUITES, otherwise="file"),
        help="Ten questions or 500 for the shipped model, everyday questions for others, or JSON lines of your "
        "own.",
    ),
    which_engine("Which engine is asked; with both, their texts are also compared with each other."),
    click.option(
        "--min-correct",
        callback=_read_fraction,
        default="7/10",
        show_default=True,
        metavar="N/M",
        help="Minimum fraction of correct answers of each engine, such as 7/10 or 0.7.",
    ),
    count("--max-tokens", "max_tokens", "Maximum length of an answer, in tokens.", 24),
    *ENGINES,
)
def command(say: object, **options: Any) -> Receipt:
    """Ask the model questions and count correct, coherent and garbled answers.

    Shows in seconds whether an engine still makes sense; `crossval layers` finds where it goes
    wrong. Exit 0 when every engine that was asked answers enough questions correctly, 1 when one does not.

    \b
    Example:
      crossval smoke
      crossval smoke --suite long --engine both --min-correct 0.95 --receipt smoke.json
    """
    return crossval.smoke_test(**options)
