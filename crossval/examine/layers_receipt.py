"""Receipts of kind ``layers`` and ``diff``: two engines compared tap by tap, each audited over the same passes.

The gate checks what must follow from rows, audits, model and token ids with the functions that ``LAYERS`` lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from crossval.audit import receipt_checks as audit_checks
from crossval.audit.products import any_deviates
from crossval.audit.summary import audit_verdict, within_of
from crossval.causal import receipt as causal_receipt
from crossval.compare import receipt as compared
from crossval.compare import rows as compare
from crossval.compare.receipt import row_from_json, row_to_json
from crossval.compare.rows import Coverage, LayersResult, Location, Skip, TapRow
from crossval.examine import graph
from crossval.examine.verdict import AGREEMENT, Audits, Verdict, arbitrate, weaker
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.passes import Numerics, PassPlan, n_after
from crossval.receipts.file import Receipt
from crossval.receipts.kind import VIEWS, Amount, Checks, Kind, Summary, summary_conflicts
from crossval.receipts.once import once
from crossval.receipts.party import Party
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import plan_conflicts, plan_from_json, plan_to_json, vocabulary_conflicts
from crossval.repeat import floors_receipt
from crossval.terms import SIDES, Side
from crossval.traces.read import TraceModel

Diagnoses = Sequence[Mapping[str, Any]]
"""Of the first wrong operation of each engine that has one (``crossval.diagnose.findings``)."""


DEFAULT_RUN = "default_run"
"""Field of the receipt that holds the run with flash attention."""


@dataclass(frozen=True)
class Examined:
    """A comparison, both audits of the same passes, and what was made of them."""

    result: LayersResult
    audits: Audits = field(default_factory=dict)
    diagnoses: Diagnoses = ()
    views: Mapping[str, Any] = field(default_factory=dict)
    """``floors`` and ``causal`` as a receipt holds them: what of it was asked for and made."""
    default_run: DefaultRun | None = None


@dataclass(frozen=True)
class DefaultRun:
    """The same tokens run with flash attention, as people run engines in which it is on by default.

    It hides attention's scores and weights, so that tensors are captured without it first; what people
    run is checked by the tensors that exist there.
    """

    numerics: Mapping[Side, Mapping[str, Any]]
    """How both engines round in it."""
    examined: Examined
    cpp_available: bool
    """Whether the reference is bitnet.cpp."""


def has_default_run(numerics: Mapping[str, Any]) -> bool:
    """Return whether an engine was captured without the flash attention that it has by default."""
    return numerics.get("flash_attention") is False


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
        **({} if found.default_run is None else {DEFAULT_RUN: _default_run_to_json(found.default_run)}),
    }


def _default_run_to_json(run: DefaultRun) -> dict[str, Any]:
    """Return the run's numerics, its examination, and what follows from it but for the engines' names."""
    written = to_json(run.examined)
    summary = summarize(run.examined)
    return {
        "numerics": dict(run.numerics),
        **written,
        **summary.to_json(verdict(run.examined, summary), cpp_available=run.cpp_available),
    }


@once
def default_run_alone(receipt: Receipt) -> Receipt:
    """Return the receipt that the run with flash attention would have by itself."""
    held = receipt[DEFAULT_RUN]
    parties = {str(side): {**receipt[side], "numerics": held["numerics"][side]} for side in SIDES}
    rest = {name: value for name, value in receipt.items() if name not in (DEFAULT_RUN, *VIEWS)}
    fields = {name: value for name, value in held.items() if name != "numerics"}
    return Receipt({**rest, **parties, **fields})


def decisive(receipt: Receipt) -> Receipt:
    """Return the receipt that the verdict rests on: this one, or that of its run with flash attention."""
    if DEFAULT_RUN not in receipt:
        return receipt
    captured = replace(from_json(receipt), default_run=None)
    by_capture = verdict(captured, summarize(captured))
    return receipt if by_capture == receipt["verdict"] else default_run_alone(receipt)


@once
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
    default_run = None
    if DEFAULT_RUN in receipt:
        default_run = DefaultRun(
            receipt[DEFAULT_RUN]["numerics"],
            from_json(default_run_alone(receipt)),
            Party.from_json(receipt["reference"]).is_bitnet_cpp,
        )
    return Examined(result, receipt["audit"] or {}, receipt["diagnosis"] or (), views, default_run)


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
    """Return the verdict, reached by arbitration from the comparison and both audits.

    What people run has to hold as well: the run with flash attention can only weaken agreement.
    """
    audits = [audit_verdict(found.audits.get(side)) for side in SIDES]
    reached = arbitrate(AGREEMENT[summary.status], *audits, deviates=any_deviates(found.audits))
    if found.default_run is None:
        return reached
    run = found.default_run.examined
    return weaker(reached, verdict(run, summarize(run)))


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
    stated = compared.states_tokens(receipt)
    for row in result.rows:
        complaints += _row_shape(receipt, result.plan, row, stated=stated)
    present = {(row.pass_index, row.tap) for row in result.rows}
    present |= {(skip.pass_index, skip.tap) for skip in result.coverage.skipped}
    model = receipt["model"]
    form = model["architecture"], model.get("input_norms", False)
    numerics = (Numerics.from_json(receipt[side]["numerics"]) for side in SIDES)
    inside = frozenset().union(*(one.inside_others(*form) for one in numerics))
    required = [tap for tap in _required(result, n_layers) if taps.parse(tap).tap not in inside]
    for index in range(len(result.plan)):
        missing = [tap for tap in required if (index, tap) not in present]
        if missing:
            complaints.append(f"pass {index}: {missing[0]} was neither compared nor reported as skipped")
    n_decode = n_after(result.plan, len(receipt["prompt"]["token_ids"]))
    if receipt["settings"]["n_decode"] != n_decode:
        complaints.append(f"settings.n_decode is {receipt['settings']['n_decode']}, the passes say {n_decode}")
    return complaints


def _required(result: LayersResult, n_layers: int) -> list[str]:
    """Return the taps every pass must have; one that a model may lack counts when any row has it."""
    names = taps.outline_taps(n_layers) if result.mode == "outline" else taps.all_taps(n_layers)
    seen = {taps.parse(row.tap).tap for row in result.rows if compared.is_tap(row.tap, n_layers)}
    optional = OPTIONAL_TAPS - seen
    return [name for name in names if taps.parse(name).tap not in optional]


def _row_shape(receipt: Receipt, plan: Sequence[PassPlan], row: TapRow, *, stated: bool) -> list[str]:
    """Check pass, token count, worst token and element count of a row; an invalid row has nothing to check.

    ``stated``: rows state the NMSE of each token, or that they keep none.
    """
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
    kept = row.worst_token is not None and compare.keeps_tokens(row.tap, row.rows_compared, n_tokens)
    if stated and kept != (row.token_nmse is not None):
        return [f"{where}: NMSE of each token is {'missing' if kept else 'kept of a row that has none'}"]
    each, worst = row.token_nmse or (), row.worst_token
    # Of an undefined NMSE nothing is larger; how many there are is checked with the metrics.
    if len(each) == n_tokens and worst is not None and each[worst - one.start] != max(each, key=_nmse_rank):
        return [f"{where}: worst token at position {worst}, another has a larger NMSE"]
    model, n_rows = TraceModel.of_receipt(receipt), row.rows_compared
    low, high = (
        compared.n_elements(row.tap, model, one, rows)
        for rows in (range(n_rows), range(n_tokens - n_rows, n_tokens))
    )
    if not low <= row.n_elements <= high:
        return [f"{where}: {row.n_elements} elements, the model's shape gives {low}"]
    return []


def _nmse_rank(nmse: float | None) -> float:
    return math.inf if nmse is None else nmse


_VIEW_CHECKS: Mapping[str, Callable[[Receipt, Sequence[TapRow]], list[str]]] = {
    "floors": floors_receipt.complaints,
    "causal": causal_receipt.complaints,
}
assert tuple(_VIEW_CHECKS) == VIEWS


def further_checks(receipt: Receipt) -> Checks:
    """Return the checks of the audits, and of each view that was asked for or is there."""
    asked = [name for name in VIEWS if name in receipt or receipt["settings"].get(name)]
    checks: dict[str, Callable[[Receipt], list[str]]] = {name: _view_check(name) for name in asked}
    live = all(receipt[side]["status"] == "live" for side in SIDES)
    if DEFAULT_RUN in receipt or (live and any(has_default_run(receipt[side]["numerics"]) for side in SIDES)):
        checks["default run"] = _default_run_complaints
    return {"audits": audit_checks.complaints, **checks}


def _default_run_complaints(receipt: Receipt) -> list[str]:
    """Check the run with flash attention as a receipt of its own, and that it is one where there must be one."""
    if DEFAULT_RUN not in receipt:
        return ["captured without flash attention, and not checked with it, as the engine runs by default"]
    held = receipt[DEFAULT_RUN]
    alone = default_run_alone(receipt)
    found = []
    for side in SIDES:
        stated = receipt[side]["numerics"]
        if has_default_run(stated) and held["numerics"][side].get("flash_attention") is not True:
            found.append(f"the {side} ran without flash attention")
    if [one["token_ids"] for one in held["results"]["passes"]][:1] != [
        one["token_ids"] for one in receipt["results"]["passes"]
    ][:1]:
        found.append("it was fed another prompt")
    found += summary_conflicts(LAYERS, alone)
    for check in (*LAYERS.checks.values(), audit_checks.complaints):
        found += check(alone)
    return found


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
    if DEFAULT_RUN in receipt:
        for one in demands(default_run_alone(receipt), policy):
            yield replace(one, name=f"{one.name}, default run")


def within(receipt: Receipt) -> float:
    """Return the distance below which the audits show nothing."""
    audits = [receipt["audit"] or {}]
    if DEFAULT_RUN in receipt:
        audits.append(receipt[DEFAULT_RUN]["audit"])
    return max(within_of(audit.get(side)) for audit in audits for side in SIDES)


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
    within=within,
)
DIFF = replace(LAYERS, name="diff")
