"""Shared by all printing: the console, plain lines, tables, fractions as percent."""

from __future__ import annotations

import io
import sys
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120
BOX = box.SIMPLE_HEAD
VERDICT_STYLE = {
    "parity": "bold green",
    "pass": "bold green",
    "divergence": "bold red",
    "fail": "bold red",
    "incomplete": "bold yellow",
    "agrees_within": "bold yellow",
    "deviates": "bold yellow",
}


class _Console(Console):
    """Leaves it to the command line what a closed pipe means; rich would exit with 1, which is a divergence."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(file: TextIO | None = None) -> Console:
    """Return a console on ``file`` (stdout) without markup, so that data is never interpreted as style."""
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" instead of failing
    width = None if stream.isatty() else PLAIN_WIDTH
    return _Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def plain(text: str) -> str:
    """Return text with control and other non-printable characters written as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text
    )


def new_table() -> Table:
    """Return an empty table in the style of all tables."""
    return Table(box=BOX, pad_edge=False, collapse_padding=True)


def show_line(out: Console, text: str) -> None:
    """Print one line, never wrapped or cut, control characters escaped; leading newlines stay."""
    body = text.lstrip("\n")
    out.print(Text("\n" * (len(text) - len(body)) + plain(body)), soft_wrap=True)


def clip(text: str, limit: int) -> str:
    """Return text as one printable line of at most ``limit`` characters."""
    shown = plain(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def percent(rate: float | None) -> str:
    """Return a fraction as percent; only a true 1 shows as 100 %."""
    if rate is None:
        return "-"
    if rate == 1.0:
        return "100 %"
    return f"{min(rate * 100, 99.99):.2f} %"
