"""Rows of a comparison in a receipt: as JSON, and checked against each other and the tolerance table.

The checks return complaints, empty when all is well. A status is read only to compare it with what the numbers
give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossval.compare import rows as compare
from crossval.compare.rows import TapRow, choose_policy
from crossval.model import taps
from crossval.model.tolerance import PolicyName, describe, tolerance_for
from crossval.passes import PassPlan
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Checks
from crossval.receipts.once import once
from crossval.receipts.party import Party, compute_dtypes
from crossval.receipts.policy import GateCheck, Policy, at_least
from crossval.receipts.values import number, show
from crossval.terms import LOGITS, SIDES
from crossval.traces.read import TraceModel, expected_shape

_ROUNDING = 1e-9
"""Room for the last bits of float64 sums; edits that matter are far larger."""
_FLOATS = ("exact_match_rate", "cosine", "worst_token_cosine", "nmse", "worst_token_nmse", "max_abs", "norm_ratio")


def row_to_json(row: TapRow) -> dict[str, Any]:
    """Return a row as JSON: metrics that are not finite become null, and the status follows from the rest."""
    data = {**vars(row), "floor": number(row.floor), "bound": dict(row.bound)}
    for name in _FLOATS:
        data[name] = number(data[name])
    if row.token_nmse is not None:
        data["token_nmse"] = [number(value) for value in row.token_nmse]
    data["status"] = compare.row_status(row_from_json(data))
    return data


def row_from_json(data: Mapping[str, Any]) -> TapRow:
    """Return the row of a receipt that is valid by the schema."""
    each = data.get("token_nmse")
    return TapRow(**{**data, "bound": dict(data["bound"]), "token_nmse": None if each is None else tuple(each)})


@once
def rows_of(receipt: Receipt) -> Sequence[tuple[str, TapRow]]:
    """Return every row of a ``layers``, ``diff`` or ``greedy`` receipt with a name for messages."""
    return [(where, row_from_json(row)) for where, row in _as_stated(receipt)]


def _as_stated(receipt: Receipt) -> Iterator[tuple[str, Mapping[str, Any]]]:
    results = receipt["results"]
    for row in results.get("rows", ()):
        yield f"pass {row['pass_index']} {row['tap']}", row
    for index, prompt in enumerate(results.get("prompts", ())):
        for step in prompt["steps"]:
            yield f"prompt {index} step {step['step']} logits", step["logits"]


def states_tokens(receipt: Receipt) -> bool:
    """Return whether rows state the NMSE of each token, or that they keep none: older versions did not."""
    return any("token_nmse" in row for _, row in _as_stated(receipt))


def is_tap(name: str, n_layers: int) -> bool:
    """Return whether a model of so many layers can have this tap."""
    try:
        layer = taps.parse(name).layer
    except ValueError:
        return False
    return layer is None or layer < n_layers


def n_elements(tap: str, model: TraceModel, plan: PassPlan, rows: Sequence[int]) -> int:
    """Return how many elements of a tap are compared at some tokens of a pass; ``rows``: indices within the pass.

    Raw attention scores count up to each token's own position: the rest is hidden by the causal mask.
    """
    if taps.op_of(tap).kind.unmasked:
        return model.n_heads * sum(plan.start + row + 1 for row in rows)
    return math.prod(expected_shape(tap, model, plan, tuple(rows)))


# --- what follows from rows -----------------------------------------------------------------------------------


def min_cosine(rows: Sequence[TapRow]) -> float | None:
    """Return the smallest cosine; None when there is none, or a row that differs has no cosine.

    Two arrays of zeros have equal bits and no direction: they do not count.
    """
    cosines = [row.cosine for row in rows if not (row.cosine is None and compare.row_status(row) == "equal")]
    known = [cosine for cosine in cosines if cosine is not None]
    return min(known) if known and len(known) == len(cosines) else None


def fraction_equal(rows: Sequence[TapRow]) -> float | None:
    """Return bit-identical elements over all elements; a row without a rate counts as all different."""
    total = sum(row.n_elements for row in rows)
    return sum((row.exact_match_rate or 0.0) * row.n_elements for row in rows) / total if total else None


def logits_fraction_equal(rows: Sequence[TapRow]) -> float | None:
    """Return the same of the logits alone."""
    return fraction_equal([row for row in rows if row.tap == LOGITS])


# --- checks ---------------------------------------------------------------------------------------------------


def tolerance_policy(receipt: Receipt) -> PolicyName:
    """Return which tolerance table applies to these two engines in this version of the tool."""
    ours, theirs = (Party.from_json(receipt[side]).identity for side in SIDES)
    return choose_policy(ours, theirs, compute_dtypes(receipt))


def thresholds(receipt: Receipt) -> list[str]:
    """Check the table in force, and floor and bounds of every row against it."""
    policy, found, n_layers = (
        tolerance_policy(receipt),
        receipt["thresholds"],
        receipt["model"]["shape"]["n_layers"],
    )
    complaints = [
        f"thresholds.{name} is {show(found.get(name))}, this version checks these engines against {show(value)}"
        for name, value in describe(policy).items()
        if found.get(name) != value
    ]
    for where, row in rows_of(receipt):
        if not is_tap(row.tap, n_layers):
            complaints.append(f"{where}: the model has no tap {row.tap}")
            continue
        table = tolerance_for(row.tap, n_layers, policy)
        if row.status == "invalid" and not row.bound:
            continue  # nothing could be measured, so there was nothing to check against a bound
        if set(row.bound) != set(table.bound) or not all(_close(row.bound[k], v) for k, v in table.bound.items()):
            complaints.append(f"{where}: bounds are not those of the tolerance table")
        if not _close(row.floor, table.floor):
            complaints.append(f"{where}: floor is {show(row.floor)}, the tolerance table says {table.floor:.6g}")
    return complaints


def metrics(receipt: Receipt) -> list[str]:
    """Check that the metrics of every row can belong to one and the same pair of arrays."""
    stated = states_tokens(receipt)
    silent = [
        f"{where}: says nothing of the NMSE of each token, other rows do"
        for where, row in _as_stated(receipt)
        if stated and "token_nmse" not in row
    ]
    return silent + [f"{where}: {what}" for where, row in rows_of(receipt) for what in _metric_conflicts(row)]


def _metric_conflicts(row: TapRow) -> Iterator[str]:
    rate, nmse, cosine, ratio = row.exact_match_rate, row.nmse, row.cosine, row.norm_ratio
    if rate is not None and not _whole(rate * row.n_elements):
        yield f"exact_match_rate {rate} of {row.n_elements} elements is not a whole number of elements"
    if row.bitwise_equal and rate != 1.0:
        yield f"bitwise_equal but exact_match_rate is {show(rate)}"
    if row.max_abs is None:
        return
    if (row.max_abs == 0.0) != (row.max_ulp == 0):
        yield f"max_abs {row.max_abs:g} contradicts max_ulp {show(row.max_ulp)}"
    same = row.max_abs == 0.0
    if same != (row.worst_token is None):
        yield f"max_abs {row.max_abs:g} contradicts worst_token {show(row.worst_token)}"
    if same and not (nmse == 0.0 and row.worst_token_nmse == 0.0 and ratio == 1.0):
        yield "no value differs, but NMSE or norm ratio says otherwise"
    if same and not (_is_one(cosine) and _is_one(row.worst_token_cosine)):
        yield "no value differs, but the cosine is not 1"
    if not same and (rate == 1.0 or nmse == 0.0):
        yield "some value differs, but the exact-match rate or the NMSE says otherwise"
    if (cosine is None) != (row.worst_token_cosine is None):
        yield "only one of cosine and worst token cosine is defined"
    if row.max_abs < 0.0 or (nmse is not None and nmse < 0.0) or (ratio is not None and ratio < 0.0):
        yield "a distance is negative"
    if nmse is not None and cosine is not None and ratio is not None:
        implied = 1.0 + ratio**2 - 2.0 * ratio * cosine  # |c - r|^2 / |r|^2, multiplied out
        if not abs(implied - nmse) <= _ROUNDING * (1.0 + ratio**2):
            yield f"NMSE {nmse:.6g} contradicts cosine and norm ratio, which give {implied:.6g}"
    if nmse is not None and row.worst_token_nmse is not None and row.worst_token_nmse < nmse * (1 - _ROUNDING):
        yield "the worst token's NMSE is below the whole tap's"
    worst, worst_cosine = row.worst_token_nmse, row.worst_token_cosine
    if worst is not None and worst_cosine is not None and worst < 1.0 - max(0.0, worst_cosine) ** 2 - _ROUNDING:
        # At a given angle no scale brings |c - r|^2 / |r|^2 below sin^2.
        yield f"worst token cosine {worst_cosine:.6g} contradicts the worst token's NMSE {worst:.6g}"
    yield from _token_conflicts(row)
    if row.rows_compared == 1 and not (
        _close(row.worst_token_nmse, nmse) and _close(row.worst_token_cosine, cosine)
    ):
        yield "one token was compared, but its metrics are not the whole tap's"


def _token_conflicts(row: TapRow) -> Iterator[str]:
    if row.token_nmse is None:
        return
    if row.rows_compared < 2:
        yield "one token was compared, but the NMSE of several is kept"
    if len(row.token_nmse) != row.rows_compared:
        yield f"{len(row.token_nmse)} tokens have an NMSE, {row.rows_compared} were compared"
        return
    known = [value for value in row.token_nmse if value is not None]
    worst = None if len(known) < len(row.token_nmse) else max(known)
    held = None if row.worst_token_nmse is None else compare.rounded(row.worst_token_nmse)
    if worst != held:
        yield f"the largest NMSE of a token is {show(worst)}, the worst token's is {show(held)}"


def _is_one(value: float | None) -> bool:
    """Accept None too: two arrays of zeros have no direction."""
    return value is None or abs(value - 1.0) <= _ROUNDING


def _whole(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * max(1.0, value * 1e-6)


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1e-300)


def statuses(receipt: Receipt) -> list[str]:
    """Check the status of every row against its numbers and bounds."""
    return [
        f"{where}: status is {row.status}, its numbers say {compare.row_status(row)}"
        for where, row in rows_of(receipt)
        if row.status != compare.row_status(row)
    ]


ROW_CHECKS: Checks = {"metrics": metrics, "row status": statuses}


def exactness(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check the cosine, that every row is bit-identical, and which tolerance table applies, where demanded."""
    if policy.min_cosine is not None:
        yield at_least("cosine", receipt["parity"]["cosine_similarity"], policy.min_cosine)
    if policy.require_bitwise:
        inexact = [where for where, row in rows_of(receipt) if compare.row_status(row) != "equal"]
        detail = f"first inexact: {inexact[0]}" if inexact else "all bits equal"
        yield GateCheck("bitwise", not inexact, detail)
    if policy.tolerance == "same":
        used = tolerance_policy(receipt)
        yield GateCheck("tolerance", used == "same", f"these engines are checked against the {used!r} table")
