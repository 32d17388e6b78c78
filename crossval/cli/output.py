"""What the commands write: the receipt, its tables, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from crossval import terms
from crossval.cli.exits import exit_code
from crossval.console import console, plain, show_line
from crossval.examine.triage import show_triage
from crossval.receipts import file as receipt
from crossval.registry import show_receipt


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
        out = console()
        show = show_triage if plain_words else show_receipt
        show(out, made)
        if more is not None:
            more(out)
        if path is not None:
            show_line(out, f"receipt: {path}")
    raise click.exceptions.Exit(exit_code(made))


@contextmanager
def progress() -> Iterator[terms.Progress]:
    """Yield a progress callback (what, done, total): a bar when stderr is a terminal, otherwise no output."""
    err = Console(stderr=True)
    if not err.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True) as bars:
        task = bars.add_task("", total=1)
        yield lambda what, done, total: bars.update(task, description=plain(what), completed=done, total=total)
