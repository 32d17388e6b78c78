"""``crossval report``, ``show`` and ``history``: receipts that were written before."""

from __future__ import annotations

from pathlib import Path

import click

import crossval
from crossval.cli.options import COLOR, DETAIL, PATH
from crossval.cli.output import screen, write_json
from crossval.console import show_line
from crossval.errors import UsageError
from crossval.files import STREAM, write_atomically
from crossval.receipts import file as receipt
from crossval.registry import show_receipt
from crossval.report import history
from crossval.report.pages import read_history
from crossval.sweep import summary
from crossval.sweep.page import make_page
from crossval.sweep.show import show_sweep

RECEIPTS = click.argument("receipts", nargs=-1, required=True, type=PATH, metavar="RECEIPT...")


@click.command("report")
@RECEIPTS
@click.option("--html", required=True, type=PATH, metavar="OUT", help="File to write; -: stdout.")
@COLOR
def report(receipts: tuple[Path, ...], html: Path) -> None:
    """Write receipts as one HTML page: verdict, figures, findings, tables, provenance.

    The page needs no network and no script. RECEIPT is a file, or a folder of them; of a sweep's
    folder, its cells. Two receipts are shown side by side. The summary of a sweep, alone, gives the
    sweep's page.

    \b
    Example:
      crossval report receipts/layers-shipped.json --html parity.html
    """
    if len(receipts) == 1 and summary.is_summary(receipts[0]):
        write_atomically(html, make_page(summary.read(receipts[0])).encode())
    else:
        crossval.write_report(list(map(summary.receipts_in, receipts)), html)
    if html != STREAM:
        show_line(screen(), f"page: {html}")


@click.command("show")
@click.argument("path", type=PATH, metavar="RECEIPT")
@click.option("--csv", "table", metavar="TABLE", help="Print this table as CSV; `rows` is in most kinds.")
@COLOR
@DETAIL
def show(path: Path, table: str | None) -> None:
    """Print a receipt as the command printed that wrote it. Checks nothing: see `crossval gate`.

    RECEIPT may be -, stdin.

    \b
    Example:
      crossval show receipts/greedy-shipped.json
      crossval show receipts/greedy-shipped.json --csv steps
    """
    if summary.is_summary(path) and table is None:
        show_sweep(screen(), summary.read(path))
        return
    opened = summary.read(path) if summary.is_summary(path) else receipt.read(path)
    if table is None:
        show_receipt(screen(), opened)
        return
    try:
        frame = opened.frame(table)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    write_json(frame.to_csv(index=False))


@click.command("history")
@RECEIPTS
@click.option("--csv", "as_csv", is_flag=True, help="Print every column as CSV.")
@COLOR
def show_history(receipts: tuple[Path, ...], as_csv: bool) -> None:
    """List receipts by date, with what changed since the last one of the same comparison.

    RECEIPT is a file, or a folder of them; of a sweep's folder, its cells. Receipts of one kind,
    model, prompt and reference are one comparison.

    \b
    Example:
      crossval history receipts/
    """
    made = read_history(list(map(summary.receipts_in, receipts)))
    if as_csv:
        write_json(made.to_csv(index=False))
    else:
        history.show(screen(), made)
