"""Print a self-test's receipt: the detection table and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.console import new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict

_SIDE_OF = {"candidate_defect": "candidate", "reference_defect": "reference"}


def show_selftest(out: Console, receipt: Receipt) -> None:
    """Print one line per case, the findings that differ from the expected ones, and the verdict."""
    rows = receipt["results"]["rows"]
    show_line(
        out,
        "\nInjected faults, and where they were found (engine, layer, operation, pass); '=': as expected.",
    )
    out.print(cases_table(rows))
    counts, verdict = receipt["results"]["summary"], receipt["verdict"]
    show_verdict(
        out,
        verdict,
        f"faults located correctly: {counts['faults']['ok']} of {receipt['thresholds']['n_faults']}; "
        f"healthy runs without a finding: {counts['healthy']['ok']} of {receipt['thresholds']['n_healthy']}",
    )


def cases_table(rows: list[Mapping[str, Any]]) -> Table:
    """Return one line per case: what was injected, what is expected, what was found."""
    table = new_table()
    for name in ("put in", "expected", "found", "diagnosis", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        there, seen = _place(row["expected"]), _place(row["found"])
        table.add_row(
            row["fault"] or f"nothing, {row['n_prompt']} tokens",
            there,
            "=" if seen == there else seen,
            plain(_diagnosis(row)),
            Text("ok", "green") if row["ok"] else Text("WRONG", "bold red"),
        )
    return table


def _place(data: Mapping[str, Any]) -> str:
    """Return side, layer, operation and kind of pass; the verdict where no operation is wrong."""
    if data["op"] is None:
        return str(data["verdict"])
    layer = "" if data["layer"] is None else f"{data['layer']} "
    return f"{_SIDE_OF.get(data['verdict'], data['verdict'])} {layer}{data['op']} {data['pass_kind']}"


def _diagnosis(row: Mapping[str, Any]) -> str:
    """Return the name found, and the correct one where it differs."""
    name, right = row["found"]["name"], row["expected"]["names"]
    if name in right or (name is None and not right):
        return name or "-"
    return f"{name or 'none'}, expected {right[0] if right else 'none'}"
