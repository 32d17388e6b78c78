"""Where an error enters and where it shows: the operations that audits find wrong, beside the first divergence.

An audit judges each operation by its bound, which is tight; two engines are compared within what two correct
ones may differ by, which grows from layer to layer. So an operation is often found wrong before the engines part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.audit import show as audit_show
from crossval.audit import summary
from crossval.console import new_table, show_line
from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.repeat.cells import number
from crossval.terms import LOGITS, SIDES, Side

STYLE = {"ok": "green", "within": "yellow", "guilty": "bold red", "invalid": "bold red", "unchecked": "yellow"}
WORDS = {"ok": "ok", "guilty": "WRONG", "invalid": "INVALID", "within": "within", "unchecked": "not judged"}

Place = tuple[int, int]
"""Pass, and position in execution order."""


def guilty(receipt: Receipt) -> Iterator[tuple[Side, Mapping[str, Any]]]:
    """Yield the first wrong operation of each engine that has one."""
    for side in SIDES:
        found = ((receipt["audit"] or {}).get(side) or {}).get("first_guilty")
        if found is not None:
            yield side, found


def first_place(receipt: Receipt) -> Place | None:
    """Return where the engines first differ; None: nowhere, or in a prompt that was not audited."""
    first = receipt["first_divergence"]
    if first is None or first.get("prompt_index"):
        return None
    if "tap" in first:
        return first["pass_index"], taps.execution_index(first["tap"])
    step = receipt["results"]["prompts"][0]["steps"][first["step"]]
    return step["logits"]["pass_index"], taps.execution_index(LOGITS)


def _feeds(found: Mapping[str, Any], receipt: Receipt) -> bool:
    """Return whether the first divergence, which comes later, is computed from a wrong operation.

    Within a pass each layer's output is, and so are later layers and the head; later passes read keys and values,
    of all layers that come after it.
    """
    n_layers, first = receipt["model"]["shape"]["n_layers"], receipt["first_divergence"]
    last_pass, tap = (first["pass_index"], first["tap"]) if "tap" in first else (None, LOGITS)
    if last_pass is None:
        last_pass = receipt["results"]["prompts"][0]["steps"][first["step"]]["logits"]["pass_index"]
    depth = _depth(found["tap"], n_layers)
    if found["pass_index"] < last_pass:
        return bool(depth < n_layers - 1)
    return bool(depth < _depth(tap, n_layers)) or taps.in_outline(tap)


def _depth(tap: str, n_layers: int) -> int:
    """Return the layer of a tap; what precedes layer 0 is -1, what follows the last is ``n_layers``."""
    layer = taps.parse(tap).layer
    return layer if layer is not None else -1 if tap in taps.INPUT_TAPS else n_layers


def relations(receipt: Receipt) -> Iterator[str]:
    """Yield how each wrong operation stands to the first divergence, where these are two places."""
    first = first_place(receipt)
    if first is None:
        return
    wrong = list(guilty(receipt))
    for side, found in wrong:
        at = found["pass_index"], taps.execution_index(found["tap"])
        where = f"{audit_show.place(found)} of the {side}"
        if at < first and len(wrong) == 1 and _feeds(found, receipt):
            yield (
                f"cause: {where}, wrong given its own inputs; effect: the first divergence, which is computed "
                "from it, where the engines are first farther apart than two correct ones may be"
            )
        elif at < first:
            yield (
                f"{where} is wrong given its own inputs and comes before the first divergence; whether it "
                "explains it was not tried"
            )
        elif at > first:
            yield f"{where} comes after the first divergence, and so does not explain it"


def show_relations(out: Console, receipt: Receipt) -> None:
    """Print a line for each wrong operation that is not where the engines first differ."""
    for text in relations(receipt):
        show_line(out, f"locations  {text}")


def show_guilty_layers(out: Console, receipt: Receipt, shown: Collection[int | None] = ()) -> None:
    """Print the audit of every operation of each wrong operation's layer, but of layers that are ``shown``."""
    if not any(True for _ in relations(receipt)):
        return
    for side, found in guilty(receipt):
        layer = found["layer"]
        if layer in shown:
            continue
        rows = [summary.row_from_json(row) for row in receipt["audit"][side]["rows"]]
        mine = [row for row in rows if taps.parse(row.tap).layer == layer]
        what = "embedding and head" if layer is None else f"layer {layer}"
        show_line(out, f"\nOperations of {what} of the {side}, each against its own bound.")
        table = new_table()
        for index, name in enumerate(
            ("op", "state", "worst of its bound", "values beyond", "of", "first in pass")
        ):
            table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
        for row in mine:
            state = summary.status_of(row)
            table.add_row(
                taps.parse(row.tap).tap,
                Text(WORDS[state], STYLE[state]),
                number(row.ratio, ".3g"),
                str(row.n_beyond),
                str(row.n_elements),
                "-" if row.first_beyond is None else str(row.first_beyond),
            )
        out.print(table)
