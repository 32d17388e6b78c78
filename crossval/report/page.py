"""The page: every receipt with its verdict in a sentence, figures, findings, tables and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from crossval.audit.show import cause, place, wrong_line
from crossval.console import percent, plain
from crossval.examine.advice import advice_of
from crossval.examine.greedy_show import conclude
from crossval.examine.verdict import Advice
from crossval.receipts.file import Receipt
from crossval.receipts.party import names_of
from crossval.receipts.show import sides_and_counts
from crossval.report.figure import Figure, render
from crossval.report.operations import audited_figures, compared_figures, worst_values
from crossval.report.speed import bench_figures
from crossval.report.states import STATES
from crossval.report.steps import greedy_figures
from crossval.terms import SIDES

MAX_BYTES = 1_000_000
"""Largest page."""
MAX_WORST = 20
"""Operations outside their bounds that are listed."""
GOOD = ("parity", "pass")
FIGURES: dict[str, tuple[Callable[[Receipt], Iterator[Figure]], ...]] = {
    "layers": (compared_figures, audited_figures),
    "diff": (compared_figures, audited_figures),
    "greedy": (greedy_figures, audited_figures),
    "bench": (bench_figures,),
}
"""Kind of receipt -> what draws it; a kind without figures is shown by its tables."""
ADVICE: dict[str, Callable[[Receipt], Advice]] = {"layers": advice_of, "diff": advice_of, "greedy": conclude}
"""Kind of receipt -> what its verdict means, where there is more to say than the verdict."""


@dataclass(frozen=True)
class Section:
    """What the page says of one receipt."""

    name: str
    receipt: Receipt
    figures: Sequence[tuple[str, Markup]]
    """Caption and SVG."""
    text: str
    """Everything that the terminal shows."""

    @property
    def good(self) -> bool:
        """Whether the verdict passes the gate of its kind."""
        return self.receipt.verdict in GOOD

    @property
    def sentence(self) -> str:
        """The verdict's basis: which engines, how many comparisons."""
        return plain(sides_and_counts(self.receipt))

    @property
    def advice(self) -> Advice | None:
        """What the verdict means and what to do next; None: the tables say it."""
        find = ADVICE.get(self.receipt.kind)
        return None if find is None or self.receipt["thresholds"] is None else find(self.receipt)

    @property
    def findings(self) -> Iterator[Mapping[str, str]]:
        """For each wrong engine: where, the worst value, the cause, the command."""
        guilty = {side: ((self.receipt["audit"] or {}).get(side) or {}).get("first_guilty") for side in SIDES}
        causes = {one["party"]: one for one in self.receipt["diagnosis"] or ()}
        for side in SIDES:
            found, why = guilty[side], causes.get(side)
            if found is not None:
                yield {
                    "side": f"{side} {names_of(self.receipt)[side]}",
                    "where": place(found),
                    "worst": plain(wrong_line(found)),
                    "cause": plain(cause(why)) if why else "not diagnosed",
                    "command": plain(why["command"]) if why else "",
                }

    @property
    def worst(self) -> list[Mapping[str, Any]]:
        """The first operations outside their bounds, with their worst elements."""
        return worst_values(self.receipt)[:MAX_WORST]

    @property
    def tokens(self) -> list[tuple[int, int, int]]:
        """Position and id of each token of the prompt, and of how many tensors it is the worst token."""
        rows = self.receipt["results"].get("rows", ()) if self.receipt.kind in ("layers", "diff") else ()
        worst = [row["worst_token"] for row in rows]
        return [(at, token, worst.count(at)) for at, token in enumerate(self.receipt["prompt"]["token_ids"])]

    @property
    def provenance(self) -> Iterator[tuple[str, str]]:
        """Every fact about the run, by its field name."""
        for part in ("model", "tokenizer", *SIDES, "settings", "host", "tool"):
            yield from flat(part, self.receipt[part])
        yield "created_at", self.receipt["created_at"]
        yield "digest", self.receipt["digest"]

    @property
    def rate(self) -> str:
        """Fraction of equal results, as this kind counts them."""
        return percent(self.receipt["parity"]["exact_match_rate"])


def make_page(receipts: Sequence[tuple[str, Receipt, str]]) -> str:
    """Return the page about receipts, each with the name to show for it, and what the terminal shows of it.

    Raises:
        UnavailableError: the renderer of figures is not installed.
    """
    sections = [
        Section(name, receipt, [(one.caption, Markup(render(one))) for one in _figures(receipt)], text)
        for name, receipt, text in receipts
    ]
    return template("page.html.jinja").render(sections=sections, states=STATES)


def template(name: str) -> jinja2.Template:
    """Return one of the templates of pages, which share their head and style."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crossval", "data/report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _figures(receipt: Receipt) -> Iterator[Figure]:
    if receipt["thresholds"] is not None:
        for draw in FIGURES.get(receipt.kind, ()):
            yield from draw(receipt)


def flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the facts in a part of a receipt, by the names that lead to them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(f"{name}.{key}", item)
    elif value is not None:
        yield name, plain(", ".join(map(str, value)) if isinstance(value, list) else str(value))
