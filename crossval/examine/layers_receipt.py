"""Receipts of kind ``layers`` and ``diff``: two engines compared tap by tap, each audited over the same passes.

The gate checks what must follow from rows, audits, model and token ids with the functions that ``LAYERS`` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from crossval.audit import receipt_checks as audit_checks
from crossval.audit.summary import audit_verdict, within_of
from crossval.causal import receipt as causal_receipt
from crossval.compare import receipt as compared
from crossval.compare import rows as compare
from crossval.compare.receipt import row_from_json, row_to_json
from crossval.compare.rows import Coverage, LayersResult, Location, Skip, TapRow
from crossval.examine import graph
from crossval.examine.verdict import AGREEMENT, Audits, Verdict, arbitrate
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.passes import PassPlan, n_after
from crossval.receipts.file import Receipt
from crossval.receipts.kind import VIEWS, Amount, Checks, Kind, Summary
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import plan_conflicts, plan_from_json, plan_to_json, vocabulary_conflicts
from crossval.repeat import floors_receipt
from crossval.terms import SIDES
from crossval.traces.read import TraceModel

Diagnoses = Sequence[Mapping[str, Any]]
"""Of the first wrong operation of each engine that has one (``crossval.diagnose.findings``)."""


@dataclass(frozen=True)
class Examined:
    """A comparison, both audits of the same passes, and what was made of them."""

    result: LayersResult
    audits: Audits = field(default_factory=dict)
    diagnoses: Diagnoses = ()
    views: Mapping[str, Any] = field(default_factory=dict)
    """``floors`` and ``causal`` as a receipt holds them: what of it was asked for and made."""


def to_json(found: Examined) -> dict[str, Any]:
    """Return the fields of the receipt that hold an examination."""
    result = found.result
    return {
        "thresholds": dict(result.thresholds),
        "results": {
            "mode": result.mode,
            "n_layers": result.n_layers,
            "passes": plan_to_json(result.plan),
            "rows": [row_to_json(row) for row in result.rows],
        },
        "coverage": asdict(result.coverage),
        "audit": {side: found.audits.get(side) for side in SIDES},
        "diagnosis": list(found.diagnoses),
        **found.views,
    }


def from_json(receipt: Receipt) -> Examined:
    """Return what a valid receipt holds; of the summary only the coverage is read."""
    results, coverage = receipt["results"], receipt["coverage"]
    skipped = tuple(Skip(**skip) for skip in coverage["skipped"])
    result = LayersResult(
        rows=tuple(row_from_json(row) for row in results["rows"]),
        coverage=Coverage(coverage["required"], coverage["compared"], skipped),
        plan=plan_from_json(results["passes"]),
        thresholds=receipt["thresholds"],
        n_layers=results["n_layers"],
        mode=results["mode"],
        notes=tuple(receipt["notes"]),
    )
    views = {name: receipt[name] for name in VIEWS if name in receipt}
    return Examined(result, receipt["audit"] or {}, receipt["diagnosis"] or (), views)


def summarize(found: Examined) -> Summary:
    """Return first divergence, first inexact row, coverage and parity, computed from the rows."""
    result, rows, coverage = found.result, found.result.rows, found.result.coverage
    return Summary(
        status=result.verdict,
        required=coverage.required,
        compared=len(rows),
        skipped=[asdict(skip) for skip in coverage.skipped],
        exact_match_rate=compared.fraction_equal(rows),
        cosine=compared.min_cosine(rows),
        logits_exact_match_rate=compared.logits_fraction_equal(rows),
        first_divergence=_location_to_json(result.first_divergence),
        first_inexact=_location_to_json(result.first_inexact),
    )


def _location_to_json(location: Location | None) -> dict[str, Any] | None:
    return None if location is None else {**asdict(location), "layer": location.layer}


def verdict(found: Examined, summary: Summary) -> Verdict:
    """Return the verdict, reached by arbitration from the comparison and both audits."""
    audits = [audit_verdict(found.audits.get(side)) for side in SIDES]
    return arbitrate(AGREEMENT[summary.status], *audits)


# --- checks ---------------------------------------------------------------------------------------------------


def structure(receipt: Receipt) -> list[str]:
    """Check passes, token ids, row order, element counts and required taps against model and prompt."""
    result = from_json(receipt).result
    complaints = vocabulary_conflicts(receipt, *(one.token_ids for one in result.plan))
    n_layers = receipt["model"]["shape"]["n_layers"]
    if result.n_layers != n_layers:
        complaints.append(f"results.n_layers is {result.n_layers}, the model has {n_layers}")
    ids = receipt["prompt"]["token_ids"]
    if not ids or list(result.token_ids[: len(ids)]) != ids:
        complaints.append("prompt.token_ids are not what the passes were fed first")
    complaints += plan_conflicts(result.plan)
    keys = [compare.execution_key(row) for row in result.rows if compared.is_tap(row.tap, n_layers)]
    if keys != sorted(set(keys)):
        complaints.append("rows are repeated or out of execution order")
    for row in result.rows:
        complaints += _row_shape(receipt, result.plan, row)
    present = {(row.pass_index, row.tap) for row in result.rows}
    present |= {(skip.pass_index, skip.tap) for skip in result.coverage.skipped}
    for index in range(len(result.plan)):
        missing = [tap for tap in _required(result, n_layers) if (index, tap) not in present]
        if missing:
            complaints.append(f"pass {index}: {missing[0]} was neither compared nor reported as skipped")
    n_decode = n_after(result.plan, len(receipt["prompt"]["token_ids"]))
    if receipt["settings"]["n_decode"] != n_decode:
        complaints.append(f"settings.n_decode is {receipt['settings']['n_decode']}, the passes say {n_decode}")
    return complaints


def _required(result: LayersResult, n_layers: int) -> list[str]:
    """Return the taps every pass must have; one that a model may lack counts when any row has it."""
    if result.mode == "outline":
        return taps.outline_taps(n_layers)
    seen = {taps.parse(row.tap).tap for row in result.rows if compared.is_tap(row.tap, n_layers)}
    optional = OPTIONAL_TAPS - seen
    return [name for name in taps.all_taps(n_layers) if taps.parse(name).tap not in optional]


def _row_shape(receipt: Receipt, plan: Sequence[PassPlan], row: TapRow) -> list[str]:
    """Check pass, token count, worst token and element count of a row; an invalid row has nothing to check."""
    where = f"pass {row.pass_index} {row.tap}"
    if row.pass_index >= len(plan) or plan[row.pass_index].kind != row.pass_kind:
        return [f"{where}: there is no such {row.pass_kind} pass"]
    known = compared.is_tap(row.tap, receipt["model"]["shape"]["n_layers"])
    if not known or compare.row_status(row) == "invalid":
        return []
    one = plan[row.pass_index]
    n_tokens = len(one.token_ids)
    if row.rows_compared > n_tokens:
        return [f"{where}: {row.rows_compared} tokens compared of a pass of {n_tokens}"]
    if row.worst_token is not None and row.worst_token not in one.positions:
        return [f"{where}: worst token at position {row.worst_token}, which is not in the pass"]
    model, n_rows = TraceModel.of_receipt(receipt), row.rows_compared
    low, high = (
        compared.n_elements(row.tap, model, one, rows)
        for rows in (range(n_rows), range(n_tokens - n_rows, n_tokens))
    )
    if not low <= row.n_elements <= high:
        return [f"{where}: {row.n_elements} elements, the model's shape gives {low}"]
    return []


_VIEW_CHECKS: Mapping[str, Callable[[Receipt, Sequence[TapRow]], list[str]]] = {
    "floors": floors_receipt.complaints,
    "causal": causal_receipt.complaints,
}
assert tuple(_VIEW_CHECKS) == VIEWS


def further_checks(receipt: Receipt) -> Checks:
    """Return the checks of the audits, and of each view that was asked for or is there."""
    asked = [name for name in VIEWS if name in receipt or receipt["settings"].get(name)]
    return {"audits": audit_checks.complaints, **{name: _view_check(name) for name in asked}}


def _view_check(name: str) -> Callable[[Receipt], list[str]]:
    def check(receipt: Receipt) -> list[str]:
        if name not in receipt:
            return ["asked for, but not made: see the notes"]
        if not receipt["settings"].get(name):
            return ["there, but not asked for"]
        return _VIEW_CHECKS[name](receipt, from_json(receipt).result.rows)

    return check


def amount(receipt: Receipt) -> Amount:
    """Return how many elements of how many rows were compared, over how many tokens."""
    result = from_json(receipt).result
    n_elements, n_tokens = sum(row.n_elements for row in result.rows), len(result.token_ids)
    return Amount(n_elements, n_tokens, f"{len(result.rows)} rows, {n_elements} elements, {n_tokens} tokens")


def demands(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check that every operation of both engines was judged and is within its bound."""
    yield from graph.demands(receipt, policy)
    for side in SIDES:
        yield from audit_checks.demands(side, (receipt["audit"] or {}).get(side), policy)


def within(receipt: Receipt) -> float:
    """Return the distance below which the audits show nothing."""
    return max(within_of((receipt["audit"] or {}).get(side)) for side in SIDES)


LAYERS = Kind[Examined](
    name="layers",
    counted="values",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    verdict=verdict,
    passing="parity",
    checks={"thresholds": compared.thresholds, "structure": structure, **compared.ROW_CHECKS},
    further_checks=further_checks,
    amount=amount,
    notes=lambda found: found.result.notes,
    demands=demands,
    exactness=compared.exactness,
    rates=frozenset({"logits"}),
    within=within,
)
DIFF = replace(LAYERS, name="diff")
