"""A receipt of metamorphic checks for people: one line per relation, what failed, the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.console import new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict

MEANING = {
    "one_by_one": "one pass = token by token",
    "prefix": "later tokens reach no earlier one",
    "split": "one pass = two passes",
    "reset": "an earlier sequence changes nothing",
    "capture": "recording changes nothing",
    "threads": "any number of threads",
    "kernels": "any kernel",
}
RUNS = {
    "one_by_one": ("in one pass", "token by token"),
    "prefix": ("alone", "as the beginning of more"),
    "split": ("in one pass", "in two"),
    "reset": ("after another sequence", "after the same"),
    "capture": ("with capture", "without"),
    "threads": ("so", "as usual"),
    "kernels": ("so", "as usual"),
}
"""What the two runs of a check are."""
MOST_SHOWN = 5


def show_metamorphic(out: Console, receipt: Receipt) -> None:
    """Print a table per engine, the first failures, and the verdict."""
    rows, summary = receipt["results"]["rows"], receipt["results"]["summary"]
    for side, counts in summary.items():
        mine = [row for row in rows if row["party"] == side]
        show_line(out, f"\nThe {side} ({receipt[side]['name']}) against itself, by relation.")
        out.print(relations_table(mine))
        bad = [row for row in mine if row["status"] != "ok"]
        for row in bad[:MOST_SHOWN]:
            show_line(out, f"{row['status']:9}  {side}: {sentence(row)}")
        if len(bad) > MOST_SHOWN:
            show_line(out, f"{'':9}  {len(bad) - MOST_SHOWN} more of the {side}")
        if counts["verdict"] == "holds":
            show_line(out, f"{'holds':9}  {side}: all {counts['ok']} checks")
    counted = "; ".join(_counted(side, counts) for side, counts in summary.items())
    show_verdict(out, receipt["verdict"], counted or "nothing was checked")


def _counted(side: str, counts: Mapping[str, Any]) -> str:
    total = counts["ok"] + counts["failed"] + counts["unchecked"]
    return (
        f"{side}: {counts['ok']} of {total} checks hold, {counts['failed']} fail, {counts['unchecked']} unchecked"
    )


def relations_table(rows: list[Mapping[str, Any]]) -> Table:
    """Return one line per relation: cases, and how far they use the bound."""
    table = new_table()
    for name in (
        "relation",
        "means",
        "checks",
        "hold",
        "fail",
        "open",
        "values",
        "equal bits",
        "fraction of bound",
    ):
        table.add_column(name, justify="left" if name in ("relation", "means") else "right", overflow="fold")
    for relation, meaning in MEANING.items():
        mine = [row for row in rows if row["name"] == relation]
        if mine:
            table.add_row(relation, meaning, *_figures(mine))
    return table


def _figures(rows: list[Mapping[str, Any]]) -> Iterator[str | Text]:
    n_ok, n_failed, n_open = (
        sum(row["status"] == status for row in rows) for status in ("ok", "failed", "unchecked")
    )
    compared, different = (sum(row[name] for row in rows) for name in ("n_compared", "n_different"))
    shares = [row["worst"] for row in rows if row["expectation"] == "floor"]
    yield str(len(rows))
    yield Text(str(n_ok), "green" if n_ok == len(rows) else "")
    yield Text(str(n_failed), "bold red" if n_failed else "")
    yield Text(str(n_open), "bold yellow" if n_open else "")
    yield str(compared)
    yield "all" if compared and not different else f"{(compared - different) / max(compared, 1):.2%}"
    known = [share for share in shares if share is not None]
    yield "-" if not shares else f"{max(known):.2f}" if len(known) == len(shares) else "undefined"


def sentence(row: Mapping[str, Any]) -> str:
    """Return a check that fails or was not made in words."""
    text = f"{row['name']}, {row['case']}: "
    if row["status"] == "failed":
        held = "must be bit-identical" if row["expectation"] == "bits" else "more than rounding allows"
        text += f"{row['n_different']} of {row['n_compared']} values differ, {held}"
        text += "" if row["where"] is None else f"; first or worst at {row['where']}"
        text += "" if row["element"] is None else _element(row)
        if row["n_invalid"]:
            text += f"; {row['n_invalid']} tensors are not finite or have the wrong shape"
    else:
        text += "not checked"
        text += f"; missing: {', '.join(row['missing'][:3])}" if row["missing"] else ""
    return plain(text + ("" if row["note"] is None else f" ({row['note']})"))


def _element(row: Mapping[str, Any]) -> str:
    """Return the element that differs most, and its value in both runs."""
    element = row["element"]
    values = ("not finite" if value is None else f"{value:.9g}" for value in element["values"])
    shown = ", ".join(f"{value} {run}" for value, run in zip(values, RUNS[row["name"]], strict=True))
    return f", element {', '.join(map(str, element['index']))}: {shown}"
