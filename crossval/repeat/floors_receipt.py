"""Measured floors in a receipt: as JSON, checked for consistency, and the rows in multiples of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from crossval.compare import rows as compare
from crossval.compare.receipt import is_tap, n_elements
from crossval.compare.rows import TapRow
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS, token_axis
from crossval.passes import PassPlan
from crossval.receipts.file import Receipt
from crossval.repeat.floors import CAPTURE, PREFILL_DECODE, Floor, FloorTable
from crossval.repeat.margins import multiples
from crossval.terms import LOGITS
from crossval.traces.read import TraceModel

THREAD_COUNTS = (1, 2)
"""Numbers of threads that the reference is run with, beside its usual one."""
VARIATIONS = (PREFILL_DECODE, *(f"{n} threads" for n in THREAD_COUNTS))
"""Ways of running it that every tap is measured in; the logits also with and without capture."""

_ROUNDING = 1e-9


def to_json(table: FloorTable, rows: Sequence[TapRow]) -> dict[str, Any]:
    """Return the floors and every differing row in multiples of them, as the receipt's ``floors``."""
    return {"table": table.to_json(), "multiples": multiples_of(rows, table)}


def multiples_of(rows: Sequence[TapRow], table: FloorTable) -> list[dict[str, Any]]:
    """Return the rows whose bits are not all equal: pass, tap, times the floor (null: undefined) and words."""
    found = []
    for row in rows:
        if compare.row_status(row) != "equal":
            one = multiples(row, table)
            found.append({"pass_index": row.pass_index, "tap": row.tap, "times": one.times, "text": one.text})
    return found


def table_of(receipt: Receipt) -> FloorTable | None:
    """Return the floors of a receipt that is valid by the schema; None when none were measured."""
    return FloorTable.from_json(receipt["floors"]["table"]) if "floors" in receipt else None


def complaints(receipt: Receipt, rows: Sequence[TapRow]) -> list[str]:
    """Check the floors against model, prompt and reference, against each other, and the multiples."""
    table, shape = FloorTable.from_json(receipt["floors"]["table"]), receipt["model"]["shape"]
    reference = receipt["reference"]
    found = []
    if reference["status"] != "live" or table.engine != reference["name"]:
        found.append(f"floors of {table.engine}, the reference is {reference['name']}, {reference['status']}")
    if table.n_layers != shape["n_layers"]:
        found.append(f"floors of {table.n_layers} layers, the model has {shape['n_layers']}")
    n_tokens = len(receipt["prompt"]["token_ids"])
    if table.n_tokens != (n_tokens,) or n_tokens < 2:
        found.append(f"floors of prompts of {list(table.n_tokens)} tokens, the prompt has {n_tokens}")
        return found
    if any(not is_tap(floor.tap, shape["n_layers"]) for floor in table.floors):
        return [*found, "a floor of a tap that the model does not have"]
    found += _complete(table, rows, shape["n_layers"])
    model = TraceModel.of_receipt(receipt)
    for floor in table.floors:
        found += [f"{floor.tap}, {floor.variation}: {what}" for what in _floor(floor, model, n_tokens)]
    if receipt["floors"]["multiples"] != multiples_of(rows, table):
        found.append("multiples are not what rows and floors give")
    return found


def _complete(table: FloorTable, rows: Sequence[TapRow], n_layers: int) -> Iterator[str]:
    """Check that every tap was measured in every way, or is listed as not measured, once and in order."""
    keys = [(floor.tap, floor.variation) for floor in table.floors]
    if keys != sorted(set(keys), key=lambda key: (taps.execution_index(key[0], n_layers), key[1])):
        yield "floors are repeated or out of order"
    unmeasured = [(tap, variation) for tap, variation, _ in table.unmeasured]
    seen = {taps.parse(tap).tap for tap in [*(floor.tap for floor in table.floors), *(row.tap for row in rows)]}
    lacking = OPTIONAL_TAPS - seen
    wanted = {
        (tap, v) for tap in taps.all_taps(n_layers) for v in VARIATIONS if taps.parse(tap).tap not in lacking
    }
    wanted.add((LOGITS, CAPTURE))
    if len(set(unmeasured)) != len(unmeasured) or set(unmeasured) & set(keys):
        yield "something is both measured and not"
    if {*keys, *unmeasured} != wanted:
        missing = sorted(wanted - {*keys, *unmeasured})
        yield (
            f"{missing[0][0]}, {missing[0][1]}: neither measured nor listed as not measured"
            if missing
            else ("measured in a way that this version does not know")
        )


def _floor(floor: Floor, model: TraceModel, n_tokens: int) -> Iterator[str]:
    """Check that a floor's numbers can belong to one pair of arrays of this tap."""
    plan = PassPlan("prefill", (0,) * n_tokens, 0)
    unit, most = (n_elements(floor.tap, model, plan, rows) for rows in ((0,), range(n_tokens)))
    if not 0 < floor.n_elements <= most or not unit or floor.n_elements % unit:
        yield f"{floor.n_elements} elements, the model's shape gives {most}"
    if floor.n_different > floor.n_elements:
        yield f"{floor.n_different} of {floor.n_elements} elements differ"
    if floor.n_different == 0 and (floor.rel_l2, floor.worst_token_rel_l2) != (0.0, 0.0):
        yield "no element differs, but there is a difference"
    if floor.worst_token_rel_l2 < floor.rel_l2 * (1.0 - _ROUNDING):
        yield "the worst token's difference is below the whole tap's"
    one_token = floor.n_elements == unit and not token_axis(floor.tap)
    if one_token and not math.isclose(floor.rel_l2, floor.worst_token_rel_l2, rel_tol=_ROUNDING):
        yield "one token was compared, but its difference is not the whole tap's"
