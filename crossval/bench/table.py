"""Print benchmarks as a Markdown table: ``python -m crossval.bench.table RECEIPT...``.

Only receipts that pass the gate: every figure in a document can be recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from crossval.bench.measures import MEASURES
from crossval.bench.receipt import BENCH
from crossval.bench.show import label, spread_cell, unit_of
from crossval.errors import BadInputError, CrossvalError
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.file import Receipt

EXIT_REFUSED = 1


class RefusedError(CrossvalError):
    """A receipt that fails the gate."""

    exit_code = EXIT_REFUSED


def read_bench(path: Path) -> Receipt:
    """Return a benchmark's receipt that passes the gate.

    Raises:
        BadInputError: unreadable, against the schema, or of another kind.
        RefusedError: it fails the gate.
    """
    found = receipt.read(path)
    if found["kind"] != "bench":
        raise BadInputError(f"{path}: a receipt of kind {found['kind']}, not bench")
    failed = [check for check in gate.judge(BENCH, found) if not check.passed]
    if failed:
        raise RefusedError(f"{path}: fails the gate: {failed[0].name}: {failed[0].detail}")
    return found


def bench_markdown(receipts: Iterable[tuple[str, Receipt]]) -> str:
    """Return named receipts as one table, a row per measure; medians, with the range over the rounds."""
    names = ("model", "where", "measure", "unit", "bitnet.cpp", "bitnet_py", "ratio", "receipt")
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    return head + "".join(line for name, one in receipts for line in _lines(name, one))


def _lines(name: str, one: Receipt) -> Iterator[str]:
    work, kernel = one["results"]["work"], one["candidate"]["settings"]["kernel"]
    where = f"{one['host']['cpu_model']}, {work['n_threads']} threads, {kernel}"
    for measure in MEASURES:
        found = one["results"]["measures"][measure.name]
        figures = [spread_cell(found[side]["figure"], measure.unit) for side in ("reference", "candidate")]
        cells = [
            one["model"]["file_name"], where, label(measure, found), unit_of(measure), *figures,
            spread_cell(found["ratio"], "ratio"), f"`{name}`",
        ]  # fmt: skip
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


@click.command()
@click.argument("receipts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECEIPT...")
def main(receipts: tuple[Path, ...]) -> None:
    """Print benchmarks as a Markdown table."""
    try:
        table = bench_markdown([(path.name, read_bench(path)) for path in receipts])
    except CrossvalError as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(error.exit_code) from error
    click.echo(table, nl=False)


if __name__ == "__main__":
    main(prog_name="python -m crossval.bench.table")
