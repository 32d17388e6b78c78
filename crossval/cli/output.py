"""What the commands write: the receipt, its tables, how far long work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from crossval import terms
from crossval.cli.exits import exit_code
from crossval.console import Detail, Screen, console, plain, show_line
from crossval.examine.triage import show_triage
from crossval.files import STREAM
from crossval.receipts import file as receipt
from crossval.registry import show_receipt

DETAIL = "crossval.detail"
"""Key of how much the command prints, in the metadata of click's context."""
EVERY_S = 10.0
"""How often long work says how far it is where no bar can be drawn."""


def detail() -> Detail:
    """Return how much was asked for by ``--quiet`` and ``--verbose``."""
    context = click.get_current_context(silent=True)
    found: Detail = "normal" if context is None else context.meta.get(DETAIL, "normal")
    return found


def screen(*written: Path | None) -> Screen:
    """Return the console that people read: stdout, or stderr where one of the files ``written`` is stdout."""
    context = click.get_current_context(silent=True)
    color = None if context is None else context.color
    return console(sys.stderr if STREAM in written else None, color=color, detail=detail())


def one_stdout(**given: object) -> None:
    """Refuse two options, each of which writes its result to stdout; each by its name, with its value.

    Raises:
        click.UsageError: there are two.
    """
    used = [
        f"--{name}" if value is True else f"--{name} -" for name, value in given.items() if value in (True, STREAM)
    ]
    if len(used) > 1:
        raise click.UsageError(f"{' and '.join(used)} both write to stdout")


def publish(made: Mapping[str, Any], path: Path | None, as_json: bool) -> None:
    """Write the receipt to the requested file, and to stdout in JSON mode."""
    if path is not None:
        receipt.write(path, dict(made))
    if as_json:
        write_json(receipt.to_text(dict(made)))


def write_json(text: str) -> None:
    """Write to stdout as UTF-8, whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def finish(
    made: receipt.Receipt,
    path: Path | None,
    as_json: bool,
    *,
    plain_words: bool = False,
    more: Callable[[Console], None] | None = None,
) -> NoReturn:
    """Publish the receipt, show the tables (or the finding in plain words), and exit by the verdict."""
    publish(made, path, as_json)
    if not as_json:
        out = screen(path)
        show = show_triage if plain_words and out.detail != "quiet" else show_receipt
        show(out, made)
        if more is not None:
            more(out)
        if path not in (None, STREAM):
            show_line(out, f"receipt: {path}")
    raise click.exceptions.Exit(exit_code(made))


@contextmanager
def progress() -> Iterator[terms.Progress]:
    """Yield a progress callback (what, done, total): a bar on a terminal, else a line now and then."""
    err = Console(stderr=True)
    if detail() == "quiet":
        yield lambda what, done, total: None
        return
    if not err.is_terminal:
        yield Lines(lambda line: click.echo(line, err=True))
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True) as bars:
        task = bars.add_task("", total=1)
        yield lambda what, done, total: bars.update(task, description=plain(what), completed=done, total=total)


class Lines:
    """Progress in lines: one per ``EVERY_S`` at most, none before that time has passed."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``write`` takes a line; ``clock`` returns seconds."""
        self._write, self._clock = write, clock
        self._start = self._last = clock()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take in how far the work is."""
        now = self._clock()
        if now - self._last >= EVERY_S:
            self._last = now
            self._write(f"{plain(what)}: {done} of {total}, {now - self._start:.0f} s")
