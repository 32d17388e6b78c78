"""Shared by all printing: the console, plain lines, tables, fractions as percent."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120
ANY_WIDTH = 100_000
"""Wider than any cell."""
MIN_TEXT = 20
"""Characters to which a column of texts may be narrowed."""
BOX = box.SIMPLE_HEAD
VERDICT_STYLE = {
    "parity": "bold green",
    "pass": "bold green",
    "divergence": "bold red",
    "fail": "bold red",
    "incomplete": "bold yellow",
    "agrees_within": "bold yellow",
    "near_ties": "bold yellow",
    "deviates": "bold yellow",
}


Detail = Literal["quiet", "normal", "verbose"]
"""How much is printed: the verdict alone, what people need, every row."""


class Screen(Console):
    """A console that prints as much as was asked for, and no table wider than itself.

    It leaves it to the command line what a closed pipe means; rich would exit with 1, which is a divergence.
    """

    detail: Detail = "normal"

    def print(self, *objects: Any, **how: Any) -> None:
        """Print, unless only the verdict is wanted; a table that is too wide in parts (``fitting``)."""
        if self.detail == "quiet":
            return
        for one in objects if objects else ("",):
            for part in fitting(self, one) if isinstance(one, Table) else (one,):
                super().print(part, **how)

    def on_broken_pipe(self) -> None:
        """Raise for it."""
        raise BrokenPipeError


def console(file: TextIO | None = None, *, color: bool | None = None, detail: Detail = "normal") -> Screen:
    """Return a console on ``file`` (stdout) without markup, so that data is never interpreted as style.

    ``color``: None: as ``NO_COLOR`` and ``FORCE_COLOR`` say, else where ``file`` is a terminal. What is no
    terminal is ``COLUMNS`` wide, by default ``PLAIN_WIDTH``.
    """
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" instead of failing
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isascii() and columns.isdigit() and 0 < int(columns) < 10_000 else PLAIN_WIDTH
    if color is None:
        color = False if os.environ.get("NO_COLOR") else True if os.environ.get("FORCE_COLOR") else None
    made = Screen(
        file=stream,
        width=None if stream.isatty() else width,
        color_system=None if color is False else "standard" if color else "auto",
        force_terminal=color or None,
        no_color=False if color else None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )
    made.detail = detail
    return made


def at_most(out: Console, limit: int) -> int:
    """Return how many of a list are printed: ``limit``, or all of them where every row was asked for."""
    return sys.maxsize if isinstance(out, Screen) and out.detail == "verbose" else limit


def insist(out: Console, line: Text) -> None:
    """Print one line even where nothing but the verdict is wanted."""
    Console.print(out, line, soft_wrap=True)


def fitting(out: Console, table: Table) -> Iterator[Table]:
    """Yield a table, or where it is wider than the console its columns in several, each after the first column.

    Columns of numbers and those that must not wrap keep their full width, so that no digit is ever cut; texts
    wrap, but to no fewer than ``MIN_TEXT`` characters. Where the first column and one other alone are too wide,
    the terminal breaks their lines.
    """
    columns = [(column, list(column.cells)) for column in table.columns]
    natural = [max(_width(out, cell) for cell in (column.header, *cells)) for column, cells in columns]
    if sum(natural) + 2 * len(natural) <= out.width:
        yield table
        return
    wraps = [not column.no_wrap and column.justify != "right" for column, _ in columns]
    least = [min(n, MIN_TEXT) if wrap else n for n, wrap in zip(natural, wraps, strict=True)]
    parts = [[0]]
    for index in range(1, len(columns)):
        together = [*parts[-1], index]
        if len(together) == 2 or sum(least[one] for one in together) + 2 * len(together) <= out.width:
            parts[-1] = together
        else:
            parts.append([0, index])
    for part in parts:
        made = new_table()
        for column, wrap in ((columns[index][0], wraps[index]) for index in part):
            made.add_column(column.header, justify=column.justify, no_wrap=not wrap, overflow="fold")
        for row in zip(*(columns[index][1] for index in part), strict=True):
            made.add_row(*row)
        yield made


def _width(out: Console, cell: RenderableType) -> int:
    return out.measure(cell, options=out.options.update(width=ANY_WIDTH)).maximum


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
