"""The causal view of a receipt for people: a table of layers, and what follows from it in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from crossval.causal.receipt import Section, effects_of, last_row
from crossval.causal.view import STANDS_OUT, LayerEffect
from crossval.compare import rows as compare
from crossval.compare.receipt import row_from_json
from crossval.console import new_table, show_line
from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.terms import LOGITS

MAX_ROWS = 12
"""States shown; of more, those where something happens."""


def show_causal(out: Console, receipt: Receipt) -> None:
    """Print the table and the conclusions of a receipt that holds a causal view."""
    if "causal" not in receipt:
        return
    section = receipt["causal"]
    show_line(out, "\nBoth engines' states after each layer, continued by the specification: what is left of the")
    show_line(out, f"disagreement of the last token's logits (KL {section['baseline_kl']:.3g}).")
    out.print(effects_table(section))
    for text in conclusions(receipt):
        show_line(out, f"causal     {text}")


def effects_table(section: Section) -> Table:
    """Return one line per patched state; of many, those around which something happens."""
    effects = effects_of(section)
    table = new_table()
    for name in ("after", "KL left", "recovered", "introduced", "candidate's own KL", "reference's own KL"):
        table.add_column(name, no_wrap=True, justify="left" if name == "after" else "right")
    before = -1
    for index in _shown(section, effects):
        if index != before + 1:
            table.add_row(*["…"] * 6)
        one, before = effects[index], index
        table.add_row(
            one.tap if one.layer is None else f"layer {one.layer}",
            "= states" if one.equal_states else f"{one.kl:.2e}",
            _share(one.recovered),
            _share(one.introduced),
            f"{one.candidate_own_kl:.2e}",
            f"{one.reference_own_kl:.2e}",
        )
    return table


def _shown(section: Section, effects: Sequence[LayerEffect]) -> list[int]:
    """Return which effects to show: the ends, and those with the largest steps together with the one before."""
    indexes = range(len(effects))
    if len(effects) <= MAX_ROWS:
        return list(indexes)
    chosen = {0, len(effects) - 1}
    chosen |= {i for i in indexes if effects[i].tap == section["nothing_recovered_from"]}
    for index in sorted(indexes, key=lambda i: -abs(effects[i].introduced or 0.0)):
        if len(chosen) + 2 > MAX_ROWS:
            break
        chosen |= {max(0, index - 1), index}
    return sorted(chosen)


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{round(100 * value, 1) + 0.0:.1f} %" if abs(value) < 10.0 else f"{100 * value:.1e} %"


def conclusions(receipt: Receipt) -> Iterator[str]:
    """Yield what follows from a receipt's causal view, a sentence at a time."""
    section = receipt["causal"]
    effects, baseline = effects_of(section), section["baseline_kl"]
    if baseline == 0.0:
        logits = last_row([row_from_json(row) for row in receipt["results"]["rows"]], LOGITS)
        equal = logits is not None and compare.row_status(logits) == "equal"
        what = "are bit-identical" if equal else "give the same probabilities"
        yield f"the logits of the last token {what}: there is no disagreement to explain"
    elif not section["reliable"]:
        least = min(effects[0].candidate_own_kl, effects[0].reference_own_kl)
        noise = max(section["noise_kl"], least)
        yield (
            f"the disagreement (KL {baseline:.2g}) does not stand out from rounding noise: it is less than "
            f"{STANDS_OUT:g} times KL {noise:.2g}, so it cannot be attributed to a layer"
        )
    else:
        if receipt["verdict"] == "parity":
            yield "no operation of either engine is wrong: this is rounding that later layers amplify, not a fault"
        yield _most(section, effects)
        if section["nothing_recovered_from"] is not None:
            where = place(section["nothing_recovered_from"])
            yield f"nothing is recovered from {where} on: the error entered before that"
        if receipt["verdict"] != "parity":
            yield from _which_side(section, effects)
    if section["not_patched"]:
        names = ", ".join(place(tap) for tap in section["not_patched"][:4])
        more = ", and more" if len(section["not_patched"]) > 4 else ""
        yield f"not patched, because an engine did not give all tokens: {names}{more}"


def place(tap: str) -> str:
    """Return the state in words."""
    layer = taps.parse(tap).layer
    return "the embedding" if layer is None else f"the output of layer {layer}"


def _most(section: Section, effects: Sequence[LayerEffect]) -> str:
    index = _largest_index(section, effects)
    after = effects[-1].recovered or 0.0
    before = 0.0 if index is None else effects[index].introduced or 0.0
    if index is None or after > before:
        share, where = after, f"after {place(effects[-1].tap)}"
        if effects[-1].tap == f"blk.{effects[-1].layer}.l_out" and not section["not_patched"]:
            where += ", in the final norm or the head"
    elif index == 0:
        share, where = before, "in the embedding" if effects[0].layer is None else f"up to {place(effects[0].tap)}"
    else:
        share, where = before, f"between {place(effects[index - 1].tap)} and {place(effects[index].tap)}"
    quantity = "most of" if share > 0.5 else "the largest part of"
    size = f"{100 * min(share, 1.0):.0f} % of KL {section['baseline_kl']:.2g}"
    return f"{quantity} the disagreement ({size}) arises {where}"


def _largest_index(section: Section, effects: Sequence[LayerEffect]) -> int | None:
    return next((i for i, one in enumerate(effects) if one.tap == section["largest"]), None)


def _which_side(section: Section, effects: Sequence[LayerEffect]) -> Iterator[str]:
    """Yield which engine departs from the specification there, if only one clearly does."""
    index = _largest_index(section, effects)
    after = effects[-1].recovered or 0.0
    if index is None or after > (effects[index].introduced or 0.0):
        index = len(effects)
    if index == 0:
        return
    seen = effects[index - 1]
    own = {"candidate": seen.candidate_own_kl, "reference": seen.reference_own_kl}
    far, near = sorted(own, key=lambda side: -own[side])
    if own[far] > STANDS_OUT * max(own[near], section["noise_kl"]):
        yield (
            f"it is the {far} that departs there from the specification: from {place(seen.tap)} on its logits "
            f"are {own[far]:.2g} away, the {near}'s {own[near]:.2g}"
        )
