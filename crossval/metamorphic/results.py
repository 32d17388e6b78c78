"""Metamorphic checks as a receipt's JSON, and that receipt held against itself.

The checks of a receipt return complaints, empty when all is well, as in ``crossval.consistency``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from crossval.metamorphic.cases import Expectation, Options, Relation, required
from crossval.metamorphic.checks import (
    MetamorphicCheck,
    MetamorphicResult,
    MetamorphicVerdict,
    check_status,
    decide,
)
from crossval.receipt import Receipt

Side = Literal["candidate", "reference"]
SIDES: tuple[Side, ...] = ("candidate", "reference")
ReceiptVerdict = Literal["pass", "fail", "incomplete"]
STATES = ("ok", "failed", "unchecked")


@dataclass(frozen=True)
class MetamorphicFindings:
    """What was asked for, and the results of one or both engines in the order of ``SIDES``."""

    options: Options
    results: tuple[MetamorphicResult, ...]


def verdict_of(verdicts: list[MetamorphicVerdict]) -> ReceiptVerdict:
    """Return the verdict on all engines: one that violates fails, and nothing checked is no pass."""
    if "violated" in verdicts:
        return "fail"
    return "pass" if verdicts and set(verdicts) == {"holds"} else "incomplete"


def criterion(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return what was asked for, as the receipt's ``thresholds``."""
    options = findings.options
    return {
        "lengths": list(options.lengths),
        "thread_counts": list(options.thread_counts),
        "kernels": list(options.kernels),
        "n_decode": options.n_decode,
    }


def to_json(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return the receipt's ``results``."""
    rows = [_row(check) for result in findings.results for check in result.checks]
    return {"rows": rows, "summary": _summary(findings.results)}


def _row(check: MetamorphicCheck) -> dict[str, Any]:
    return {**asdict(check), "missing": list(check.missing)}


def _summary(results: tuple[MetamorphicResult, ...]) -> dict[str, Any]:
    return {
        result.party: {
            "verdict": decide(result.checks, result.n_required),
            **{state: sum(check_status(check) == state for check in result.checks) for state in STATES},
        }
        for result in results
    }


def summarize(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return the receipt's summary fields."""
    results = findings.results
    verdict = verdict_of([decide(result.checks, result.n_required) for result in results])
    checks = [check for result in results for check in result.checks]
    return {
        "first_divergence": None,
        "first_inexact": None,
        "coverage": {
            "required": sum(result.n_required for result in results),
            "compared": sum(check_status(check) != "unchecked" for check in checks),
            "skipped": [],
        },
        "parity": {
            "cosine_similarity": None,
            "exact_match_rate": None,
            "logits_exact_match_rate": None,
            "cpp_available": False,
            "status": verdict,
        },
        "verdict": verdict,
    }


# --- a receipt against itself ---------------------------------------------------------------------------------


def from_json(receipt: Receipt) -> MetamorphicFindings:
    """Return the findings of a valid ``metamorphic`` receipt; how many checks there must be is computed."""
    held = receipt["thresholds"]
    options = Options(
        tuple(held["lengths"]), tuple(held["thread_counts"]), tuple(held["kernels"]), held["n_decode"]
    )
    rows = [MetamorphicCheck(**{**row, "missing": tuple(row["missing"])}) for row in receipt["results"]["rows"]]
    results = []
    for side in _asked(receipt):
        checks = tuple(row for row in rows if row.party == side)
        n_required = len(_required(receipt, side, options))
        verdict = decide(checks, n_required)
        results.append(MetamorphicResult(side, receipt[side]["name"], checks, n_required, verdict))
    return MetamorphicFindings(options, tuple(results))


def _asked(receipt: Receipt) -> list[Side]:
    return [side for side in SIDES if receipt[side]["status"] != "unused"]


def _required(receipt: Receipt, side: Side, options: Options) -> list[tuple[Relation, str, Expectation]]:
    numerics = receipt[side]["numerics"]
    stated = numerics["simd_width"] is not None and numerics["fused_quantizer"] is not None
    single_head = receipt["model"]["shape"]["n_heads"] == 1
    kernels = options.kernels if side == "candidate" else ()
    only = Options(options.lengths, options.thread_counts, kernels, options.n_decode)
    return list(required(only, stated=stated, single_head=single_head))


def recompute(receipt: Receipt) -> dict[str, Any]:
    """Return summary fields and counts as the receipt's own rows give them."""
    findings = from_json(receipt)
    return {**summarize(findings), "results": {"summary": _summary(findings.results)}}


def structure(receipt: Receipt) -> list[str]:
    """Check engines, prompt, and that the rows are those of the checks asked for, in their order."""
    findings = from_json(receipt)
    options, asked = findings.options, _asked(receipt)
    complaints = []
    if not asked:
        complaints.append("no engine was checked")
    complaints += [
        f"the {side} is {receipt[side]['status']}; only a live engine can be run in other ways"
        for side in asked
        if receipt[side]["status"] != "live"
    ]
    ids, vocab_size = receipt["prompt"]["token_ids"], receipt["model"]["shape"]["vocab_size"]
    if len(ids) != options.n_tokens:
        complaints.append(f"prompt.token_ids has {len(ids)} tokens, these checks read {options.n_tokens}")
    if any(token >= vocab_size for token in ids):
        complaints.append(f"a token id is outside the vocabulary of {vocab_size}")
    if receipt["tokenizer"]["vocab_size"] != vocab_size:
        complaints.append("tokenizer.vocab_size is not the model's")
    found = [(r["party"], r["name"], r["case"], r["expectation"]) for r in receipt["results"]["rows"]]
    wanted = [(side, *one) for side in asked for one in _required(receipt, side, options)]
    if len(found) != len(wanted):
        complaints.append(f"{len(found)} rows, what is asked for needs {len(wanted)}")
    complaints += [
        f"row {index} ({row[1]}, {row[2]}) is not the check that belongs there: {', '.join(right)}"
        for index, (row, right) in enumerate(zip(found, wanted, strict=False))
        if row != right
    ]
    return complaints


def rows(receipt: Receipt) -> list[str]:
    """Check every row: its status must follow from its numbers, and these must be possible."""
    complaints = []
    for index, data in enumerate(receipt["results"]["rows"]):
        check = MetamorphicCheck(**{**data, "missing": tuple(data["missing"])})
        where = f"row {index} ({check.name}, {check.case})"
        if check.status != check_status(check):
            complaints.append(f"{where}: status is {check.status}, its numbers say {check_status(check)}")
        if check.n_different > check.n_compared:
            complaints.append(f"{where}: {check.n_different} of {check.n_compared} elements differ")
        bits_equal = check.expectation == "bits" and check.n_different == 0 and not check.n_invalid
        if bits_equal and (check.worst or check.where):
            complaints.append(f"{where}: all bits are equal, but a largest difference is named")
        if check.n_different and check.where is None:
            complaints.append(f"{where}: elements differ, and no place is named")
    return complaints


CHECKS: Mapping[str, Callable[[Receipt], list[str]]] = {"structure": structure, "row status": rows}
"""Name of a check -> function; the summary is checked with every other kind's."""
