"""A receipt held against itself: everything that must follow from its rows, its model and its token ids.

Each function returns complaints, empty when all is well. Nothing here reads a status, a verdict or a summary
except to compare it with what the numbers say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from crossval.audit import receipt_checks as audit_consistency
from crossval.audit.precision import compute_dtype
from crossval.bench import receipt as bench_results
from crossval.causal import receipt as causal_receipt
from crossval.compare import rows as compare
from crossval.compare.rows import GreedyResult, LayersResult, TapRow
from crossval.compare.tolerance import choose_policy, describe, tolerance_for
from crossval.engines.party import Party
from crossval.examine import greedy_checks as greedy_consistency
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.passes import PassPlan, pass_kind
from crossval.receipts import evidence
from crossval.receipts.file import Receipt
from crossval.receipts.values import same, show
from crossval.repeat import floors_receipt
from crossval.repeat.metamorphic import receipt as metamorphic_results
from crossval.selftest import receipt as selftest_results
from crossval.smoke import receipt as smoke_receipt
from crossval.terms import SIDES
from crossval.traces import read as trace

_ROUNDING = 1e-9
"""Room for the last bits of float64 sums; edits that matter are far larger."""


def expected_thresholds(receipt: Receipt) -> dict[str, Any]:
    """Return the tolerance table that these two engines are held to by this version of the tool."""
    return describe(_policy(receipt))


def _policy(receipt: Receipt) -> Any:
    ours, theirs = (Party.from_json(receipt[side]).identity for side in SIDES)
    audits = receipt.get("audit") or {}
    computed = {compute_dtype(receipt[side]["numerics"], audits.get(side)) for side in SIDES}
    return choose_policy(ours, theirs, computed)


def thresholds(receipt: Receipt) -> list[str]:
    """Check the table in force, and floor and bounds of every row against it."""
    expected, found = expected_thresholds(receipt), receipt["thresholds"]
    complaints = [
        f"thresholds.{name} is {show(found.get(name))}, this version holds these engines to {show(value)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    policy, n_layers = _policy(receipt), receipt["model"]["shape"]["n_layers"]
    for where, row in rows_of(receipt):
        if not _known(row.tap, n_layers):
            complaints.append(f"{where}: the model has no tap {row.tap}")
            continue
        table = tolerance_for(row.tap, n_layers, policy)
        if row.status == "invalid" and not row.bound:
            continue  # nothing could be measured, so there was nothing to hold to a bound
        if set(row.bound) != set(table.bound) or not all(_close(row.bound[k], v) for k, v in table.bound.items()):
            complaints.append(f"{where}: bounds are not those of the tolerance table")
        if not _close(row.floor, table.floor):
            complaints.append(f"{where}: floor is {show(row.floor)}, the tolerance table says {table.floor:.6g}")
    return complaints


def rows_of(receipt: Receipt) -> Iterator[tuple[str, TapRow]]:
    """Yield every row of numbers with a name for messages; those of single engines have none."""
    results = {} if receipt.get("kind") in evidence.NO_NUMBERS else receipt["results"]
    for row in results.get("rows", ()):
        yield f"pass {row['pass_index']} {row['tap']}", evidence.row_from_json(row)
    for index, prompt in enumerate(results.get("prompts", ())):
        for step in prompt["steps"]:
            yield f"prompt {index} step {step['step']} logits", evidence.row_from_json(step["logits"])


def metrics(receipt: Receipt) -> list[str]:
    """Check that the metrics of every row can belong to one and the same pair of arrays."""
    return [f"{where}: {what}" for where, row in rows_of(receipt) for what in _metric_conflicts(row)]


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
    if row.rows_compared == 1 and not (
        _close(row.worst_token_nmse, nmse) and _close(row.worst_token_cosine, cosine)
    ):
        yield "one token was compared, but its metrics are not the whole tap's"


def _is_one(value: float | None) -> bool:
    """Accept None too: two arrays of zeros have no direction."""
    return value is None or abs(value - 1.0) <= _ROUNDING


def statuses(receipt: Receipt) -> list[str]:
    """Check the status of every row against its numbers and bounds."""
    return [
        f"{where}: status is {row.status}, its numbers say {compare.row_status(row)}"
        for where, row in rows_of(receipt)
        if row.status != compare.row_status(row)
    ]


def summary(receipt: Receipt) -> list[str]:
    """Check verdict, coverage, parity, first divergence and first inexact row against the rows."""
    expected = recompute(receipt)
    for name in ("first_divergence", "first_inexact"):
        stated = receipt[name]
        if stated is not None and "after" not in stated and expected[name] is not None:
            expected[name].pop("after", None)  # a receipt of an older version does not say
    return list(_differences("", expected, receipt))


def recompute(receipt: Receipt) -> dict[str, Any]:
    """Return the summary fields as the receipt's rows and parties give them."""
    result: LayersResult | GreedyResult
    if receipt["kind"] == "smoke":
        expected = smoke_receipt.recompute(receipt)
    elif receipt["kind"] == "selftest":
        expected = selftest_results.recompute(receipt)
    elif receipt["kind"] == "metamorphic":
        expected = metamorphic_results.recompute(receipt)
    elif receipt["kind"] == "bench":
        expected = bench_results.recompute(receipt)
    elif receipt["kind"] == "greedy":
        result = evidence.greedy_from_json(receipt)
        expected = evidence.summarize_greedy(result)
    else:
        result = evidence.layers_from_json(receipt)
        expected = evidence.summarize_layers(result)
        expected["coverage"]["compared"] = len(result.rows)
    reference = Party.from_json(receipt["reference"])
    agree = receipt["tokenizer"]["engines_agree"]
    evidence.finish_summary(receipt["kind"], expected, reference, agree, receipt["audit"])
    return expected


def _differences(prefix: str, expected: Any, found: Any) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            yield from _differences(f"{prefix}.{name}".lstrip("."), value, found.get(name))
    elif not same(expected, found):
        yield f"{prefix} is {show(found)}, the rows say {show(expected)}"


def structure(receipt: Receipt) -> list[str]:
    """Check passes, token ids, row order, element counts and required taps against model and prompt."""
    shape = receipt["model"]["shape"]
    complaints = _bad_tokens(receipt, shape["vocab_size"])
    if receipt["kind"] == "greedy":
        return complaints + greedy_consistency.structure(receipt, evidence.greedy_from_json(receipt))
    return complaints + _layers_structure(receipt, evidence.layers_from_json(receipt))


def _bad_tokens(receipt: Receipt, vocab_size: int) -> list[str]:
    if receipt["tokenizer"]["vocab_size"] != vocab_size:
        return [f"tokenizer.vocab_size is {receipt['tokenizer']['vocab_size']}, the model's is {vocab_size}"]
    lists = [receipt["prompt"]["token_ids"]]
    lists += [one["token_ids"] for one in receipt["results"].get("passes", ())]
    for prompt in receipt["results"].get("prompts", ()):
        lists += [prompt["prompt_ids"], prompt["candidate_tokens"], prompt["reference_tokens"]]
    bad = [token for ids in lists for token in ids if token >= vocab_size]
    return [f"token id {bad[0]} is outside the vocabulary of {vocab_size}"] if bad else []


def _layers_structure(receipt: Receipt, result: LayersResult) -> list[str]:
    complaints = []
    n_layers = receipt["model"]["shape"]["n_layers"]
    if result.n_layers != n_layers:
        complaints.append(f"results.n_layers is {result.n_layers}, the model has {n_layers}")
    ids = receipt["prompt"]["token_ids"]
    if not ids or list(result.token_ids[: len(ids)]) != ids:
        complaints.append("prompt.token_ids are not what the passes were fed first")
    start = 0
    for index, one in enumerate(result.plan):
        if one.start != start or not one.token_ids or one.kind != pass_kind(len(one.token_ids), start):
            complaints.append(f"pass {index} does not follow the one before it")
        start += len(one.token_ids)
    keys = [compare.execution_key(row) for row in result.rows if _known(row.tap, n_layers)]
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
    n_decode = sum(one.kind == "decode" for one in result.plan)
    if receipt["settings"]["n_decode"] != n_decode:
        complaints.append(f"settings.n_decode is {receipt['settings']['n_decode']}, the passes say {n_decode}")
    return complaints


def _required(result: LayersResult, n_layers: int) -> list[str]:
    """Return the taps every pass must have; one that a model may lack counts when any row has it."""
    if result.mode == "outline":
        return taps.outline_taps(n_layers)
    seen = {taps.parse(row.tap).tap for row in result.rows if _known(row.tap, n_layers)}
    optional = OPTIONAL_TAPS - seen
    return [name for name in taps.all_taps(n_layers) if taps.parse(name).tap not in optional]


def _row_shape(receipt: Receipt, plan: Sequence[PassPlan], row: TapRow) -> list[str]:
    """Check pass, token count, worst token and element count of a row; an invalid row has nothing to check."""
    where = f"pass {row.pass_index} {row.tap}"
    if row.pass_index >= len(plan) or plan[row.pass_index].kind != row.pass_kind:
        return [f"{where}: there is no such {row.pass_kind} pass"]
    if not _known(row.tap, receipt["model"]["shape"]["n_layers"]) or compare.row_status(row) == "invalid":
        return []
    one = plan[row.pass_index]
    n_tokens = len(one.token_ids)
    if row.rows_compared > n_tokens:
        return [f"{where}: {row.rows_compared} tokens compared of a pass of {n_tokens}"]
    if row.worst_token is not None and row.worst_token not in one.positions:
        return [f"{where}: worst token at position {row.worst_token}, which is not in the pass"]
    low, high = _element_range(receipt["model"], one, row)
    if not low <= row.n_elements <= high:
        return [f"{where}: {row.n_elements} elements, the model's shape gives {low}"]
    return []


def _element_range(model: Mapping[str, Any], one: PassPlan, row: TapRow) -> tuple[int, int]:
    """Return least and most elements a row can have; raw attention scores count only what the mask shows."""
    shape = trace.TraceModel(sha256=model["sha256"], **{name: model["shape"][name] for name in _SHAPE})
    dims = trace.expected_shape(row.tap, shape, one, tuple(range(row.rows_compared)))
    if taps.op_of(row.tap).kind.unmasked:
        visible = [position + 1 for position in one.positions]
        return shape.n_heads * sum(visible[: row.rows_compared]), shape.n_heads * sum(
            visible[len(visible) - row.rows_compared :]
        )
    return math.prod(dims), math.prod(dims)


_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size")


Checks = Mapping[str, Callable[[Receipt], list[str]]]
"""Name of a check -> function; in the order a reader wants to hear about them."""


def checks_of(receipt: Receipt) -> Checks:
    """Return the checks that a receipt of this kind must stand."""
    if receipt["kind"] in evidence.AUDITED:
        asked = {name for name in evidence.VIEWS if name in receipt or receipt["settings"].get(name)}
        return {**AUDITED_CHECKS, **{name: check for name, check in VIEW_CHECKS.items() if name in asked}}
    other = {
        "greedy": GREEDY_CHECKS,
        "smoke": SMOKE_CHECKS,
        "selftest": SELFTEST_CHECKS,
        "metamorphic": METAMORPHIC_CHECKS,
        "bench": BENCH_CHECKS,
    }
    return other.get(receipt["kind"], CHECKS)


CHECKS: Checks = {
    "thresholds": thresholds,
    "structure": structure,
    "metrics": metrics,
    "row status": statuses,
    "summary": summary,
}
AUDITED_CHECKS: Checks = {**CHECKS, "audits": audit_consistency.complaints}
GREEDY_CHECKS: Checks = {**CHECKS, "audits": greedy_consistency.audits}
VIEW_CHECKS: Checks = {
    "floors": lambda receipt: _view("floors", receipt, floors_receipt.complaints),
    "causal": lambda receipt: _view("causal", receipt, causal_receipt.complaints),
}
"""Of what a receipt holds beyond the comparison, when it was asked for."""
SMOKE_CHECKS: Checks = {**smoke_receipt.CHECKS, "summary": summary}
SELFTEST_CHECKS: Checks = {**selftest_results.CHECKS, "summary": summary}
METAMORPHIC_CHECKS: Checks = {**metamorphic_results.CHECKS, "summary": summary}
BENCH_CHECKS: Checks = {**bench_results.CHECKS, "summary": summary}


def _view(name: str, receipt: Receipt, check: Callable[[Receipt, list[TapRow]], list[str]]) -> list[str]:
    """Check that a view was asked for and made, and then the view."""
    if name not in receipt:
        return ["asked for, but not made: see the notes"]
    if not receipt["settings"].get(name):
        return ["there, but not asked for"]
    return check(receipt, [row for _, row in rows_of(receipt)])


def _known(tap: str, n_layers: int) -> bool:
    try:
        layer = taps.parse(tap).layer
    except ValueError:
        return False
    return layer is None or layer < n_layers


def _whole(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * max(1.0, value * 1e-6)


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1e-300)
