"""The tables in a receipt as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from crossval.terms import SIDES

if TYPE_CHECKING:
    import pandas as pd

Receipt = Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]


def frames(receipt: Receipt) -> dict[str, pd.DataFrame]:
    """Return every table that a receipt holds, by name; the main table of its kind comes first.

    Columns are the receipt's own field names, those of nested objects joined by dots
    (``logits.cosine``); lists stay Python lists. Tables without rows are left out.
    """
    import pandas as pd  # takes half a second, which no command should pay for

    made = {name: pd.json_normalize([dict(row) for row in rows(receipt)]) for name, rows in TABLES.items()}
    return {name: table for name, table in made.items() if not table.empty}


def _rows(receipt: Receipt) -> Rows:
    rows: Rows = receipt["results"].get("rows", ())
    return rows


def _steps(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for index, prompt in enumerate(receipt["results"].get("prompts", ())):
        for step in prompt["steps"]:
            yield {"prompt_index": index, **step}


def _prompts(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for index, prompt in enumerate(receipt["results"].get("prompts", ())):
        yield {"prompt_index": index, **{name: value for name, value in prompt.items() if name != "steps"}}


def _benchmarked(receipt: Receipt) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Yield every measure beside every reference; which reference is stated where there are several."""
    results = receipt["results"]
    pairs = [results, *results.get("references", ())] if "measures" in results else []
    for number, pair in enumerate(pairs, 1):
        which = {"reference_number": number} if len(pairs) > 1 else {}
        for measure, found in pair["measures"].items():
            yield {**which, "measure": measure, "unit": found["unit"]}, found


def _rounds(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for what, found in _benchmarked(receipt):
        for side in SIDES:
            for number, value in enumerate(found[side]["raw"]):
                yield {**what, "side": side, "round": number, "value": value}


def _measures(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for what, found in _benchmarked(receipt):
        figures: dict[str, Any] = {side: found[side]["figure"] for side in SIDES}
        yield {**what, **figures, "ratio": found["ratio"]}


def _audit(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for side in SIDES:
        for row in ((receipt["audit"] or {}).get(side) or {}).get("rows", ()):
            yield {"side": side, **row}


def _diagnosis(receipt: Receipt) -> Iterator[Mapping[str, Any]]:
    for finding in receipt["diagnosis"] or ():
        yield {"side" if name == "party" else name: value for name, value in finding.items()}


def _kernels(receipt: Receipt) -> Rows:
    kernels: Rows = receipt["compute"]["kernels"]
    return kernels


TABLES: dict[str, Callable[[Receipt], Rows]] = {
    "rows": _rows,
    "steps": _steps,
    "prompts": _prompts,
    "measures": _measures,
    "rounds": _rounds,
    "audit": _audit,
    "diagnosis": _diagnosis,
    "kernels": _kernels,
}
"""Name of a table -> its rows in a receipt of any kind."""

MAIN = {"greedy": "steps", "bench": "measures"}
"""The table that a kind of receipt is about, where it is not ``rows``."""
