"""The page of a sweep: models and builds by prompts as a heat map, then every cell that shows no parity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from crossval.receipts.file import Receipt
from crossval.report.figure import Figure, render
from crossval.report.heat import heat_map
from crossval.report.page import flat, template
from crossval.report.states import STATES
from crossval.sweep.show import groups, sentence, without_parity
from crossval.sweep.summary import GOOD


def make_page(summary: Receipt) -> str:
    """Return the page.

    Raises:
        UnavailableError: the renderer of figures is not installed.
    """
    figure = heat(summary)
    provenance = [pair for part in ("models", "settings", "host", "tool") for pair in flat(part, summary[part])]
    return template("sweep.html.jinja").render(
        summary=summary,
        good=summary["verdict"] == "pass",
        sentence=sentence(summary),
        caption=figure.caption,
        svg=Markup(render(figure)),
        without=list(without_parity(summary)),
        provenance=[*provenance, ("created_at", summary["created_at"]), ("digest", summary["digest"])],
        states=STATES,
    )


def heat(summary: Mapping[str, Any]) -> Figure:
    """Return the heat map of all cells: a row per model and build, a column per prompt."""
    cells = [
        {"column": str(row["prompt"]), "row": f"{model} · {build}", "state": _state(row), "says": _says(row)}
        for (model, build), rows in groups(summary).items()
        for row in rows
    ]
    columns = [str(index) for index in range(len(summary["prompts"]))]
    names = list(dict.fromkeys(str(cell["row"]) for cell in cells))
    return Figure(
        "Every cell: models and builds by prompts (numbers as in the list below).",
        heat_map(cells, columns, names, "prompt"),
    )


def _state(row: Mapping[str, Any]) -> str:
    if row["verdict"] in GOOD:
        return "exact" if row["exact_match_rate"] == 1.0 else "within its bound"
    if row["verdict"] in (None, "incomplete"):
        return "not checked"
    return "within, not settled" if row["verdict"] == "agrees_within" else "beyond its bound"


def _says(row: Mapping[str, Any]) -> str:
    said = row["verdict"] or f"error: {row['error']['message']}"
    return f"prompt {row['prompt']}: {said}, {row['compared']} of {row['required']} compared"
