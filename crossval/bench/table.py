"""Print benchmarks as a Markdown table: ``python -m crossval.bench.table RECEIPT...``.

Only receipts that pass the gate: every figure in a document can be recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from crossval.bench.measures import FIRST_TOKEN, MEASURES, TRIED, Measure
from crossval.bench.receipt import BENCH
from crossval.bench.show import Results, beside, label, names_beside, setting_words, spread_cell, unit_of
from crossval.errors import BadInputError, CrossvalError
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.file import Receipt
from crossval.terms import Side

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


_COLUMNS = (
    "model",
    "where",
    "engines",
    "measure",
    "unit",
    "reference",
    "candidate",
    "ratio",
    "threads",
    "receipt",
)


def bench_markdown(receipts: Iterable[tuple[str, Receipt]]) -> str:
    """Return named receipts as one table, a row per measure and reference.

    Figures are medians with the range over the rounds. Threads are the reference's and the candidate's.
    """
    head = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
    return head + "".join(line for name, one in receipts for line in _lines(name, one))


def _lines(name: str, one: Receipt) -> Iterator[str]:
    kernel = one["candidate"]["settings"].get("kernel")
    where = ", ".join(part for part in (one["host"]["cpu_model"], kernel) if part)
    for names, results in zip(names_beside(one), beside(one), strict=True):
        for measure in MEASURES:
            found = results["measures"][measure.name]
            figures = [spread_cell(found[side]["figure"], measure.unit) for side in _ORDER]
            cells = [
                one["model"]["file_name"], where, f"{names['candidate']} beside {names['reference']}",
                label(measure, found), unit_of(measure), *figures,
                spread_cell(found["ratio"], "ratio"), _threads(one, results, measure), f"`{name}`",
            ]  # fmt: skip
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


_ORDER: tuple[Side, ...] = ("reference", "candidate")


def _threads(one: Receipt, results: Results, measure: Measure) -> str:
    """Return how many threads each engine had in a measure; of memory, those of the fresh process."""
    if "search" not in results:
        return str(one["results"]["work"]["n_threads"])
    name = measure.name if measure in TRIED else FIRST_TOKEN.name
    tried = [results["search"][side] for side in _ORDER]
    return "; ".join(setting_words(search["tried"], search["chosen"][name]) for search in tried)


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
