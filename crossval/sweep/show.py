"""The summary of a sweep for people: a line per model and build, and every cell that shows no parity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.console import clip, new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict
from crossval.sweep.summary import GOOD, build_name

MAX_CELLS = 20
"""Cells without parity that are listed."""


def show_sweep(out: Console, summary: Receipt) -> None:
    """Print what was compared, a table of models and builds, the cells without parity, and the verdict."""
    n = {name: len(summary[name]) for name in ("models", "prompts", "candidates", "kernels")}
    show_line(
        out,
        f"sweep      crossval {summary['command']}, {n['models']} models, {n['prompts']} prompts, "
        f"{n['candidates']} candidates, {n['kernels'] or 'no'} chosen kernels, against {summary['reference']}",
    )
    table = new_table()
    for name in ("model", "build", "prompts", "verdicts"):
        table.add_column(name, justify="right" if name == "prompts" else "left", overflow="fold")
    for (model, build), rows in groups(summary).items():
        counts = Counter(row["verdict"] or "error" for row in rows)
        style = "" if set(counts) <= set(GOOD) else "bold red"
        said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        table.add_row(plain(model), plain(build), str(len(rows)), Text(said, style))
    out.print(table)
    shown = list(without_parity(summary))
    for line in shown[:MAX_CELLS]:
        show_line(out, line)
    if len(shown) > MAX_CELLS:
        show_line(out, f"and {len(shown) - MAX_CELLS} more")
    show_verdict(out, summary["verdict"], sentence(summary))


def groups(summary: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the rows by model and build, as both are called; of models of one name, by digest as well."""
    names = [model["file_name"] for model in summary["models"]]
    called = [
        name if names.count(name) == 1 else f"{name} {model['sha256'][:8]}"
        for name, model in zip(names, summary["models"], strict=True)
    ]
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in summary["rows"]:
        found.setdefault((called[row["model"]], build_name(summary, row)), []).append(row)
    return found


def without_parity(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for every cell whose verdict is not parity: which, what it is, and where its receipt is."""
    for (model, build), rows in groups(summary).items():
        for row in rows:
            if row["verdict"] in GOOD:
                continue
            error = row["error"]
            what = f"{row['verdict']}, {row['file']}" if error is None else f"error: {error['message']}"
            text = clip(summary["prompts"][row["prompt"]], 40)
            yield f"  {model}, {build}, prompt {row['prompt']} {text!r}: {what}"


def sentence(summary: Mapping[str, Any]) -> str:
    """Return how many cells ended how."""
    counts = ", ".join(f"{count} {name}" for name, count in summary["counts"].items())
    return f"{len(summary['rows'])} cells: {counts}"
