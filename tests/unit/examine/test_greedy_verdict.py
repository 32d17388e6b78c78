"""What tokens, logits and audits prove together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from crossval.audit import summary
from crossval.audit.summary import audit_verdict
from crossval.examine.greedy_verdict import SIDES, decide, vouched
from crossval.examine.verdict import Agreement, arbitrate
from tests.support import receipt_samples as samples

CLEAN = summary.to_json(samples.audit_result(plan=samples.GREEDY_PLAN))
GUILTY = summary.to_json(samples.audit_result({(0, "blk.0.q"): 40.0}, plan=samples.GREEDY_PLAN))
LOGITS = samples.coarse_audit()
NOTHING: dict[str, Any] = {**CLEAN, "rows": [], "n_covered": 0}
AUDITS = {"clean": CLEAN, "guilty": GUILTY, "logits": LOGITS, "nothing": NOTHING, "none": None}
COMPARISONS: tuple[Agreement, ...] = ("agree", "differ", "not_compared")
OPEN = ("nothing", "none")


def verdict(comparison: Agreement, exact: bool, candidate: str, reference: str) -> str:
    return decide(comparison, exact, {"candidate": AUDITS[candidate], "reference": AUDITS[reference]})


def test_the_samples_are_what_they_are_called() -> None:
    assert [audit_verdict(AUDITS[name]) for name in ("clean", "guilty", "logits")] == ["clean", "guilty", "within"]
    assert {audit_verdict(AUDITS[name]) for name in OPEN} == {"incomplete"}


def test_what_was_judged_in_part_agrees_within_a_distance() -> None:
    for candidate, reference in (("logits", "clean"), ("clean", "logits"), ("logits", "logits")):
        assert verdict("agree", False, candidate, reference) == "agrees_within"
    assert verdict("agree", True, "logits", "logits") == "agrees_within"
    assert verdict("agree", True, "logits", "clean") == "parity"


@pytest.mark.parametrize(("candidate", "reference"), list(itertools.product(AUDITS, AUDITS)))
def test_parity_needs_audits(candidate: str, reference: str) -> None:
    for comparison, exact in itertools.product(COMPARISONS, (True, False)):
        if exact and comparison == "differ":
            continue
        found = verdict(comparison, exact, candidate, reference)
        both = candidate == reference == "clean"
        one = "clean" in (candidate, reference) and {candidate, reference} & {"logits", "nothing"}
        assert (found == "parity") == (comparison == "agree" and (both or bool(exact and one)))
        if comparison == "differ":
            assert found not in ("parity", "incomplete")
        if "guilty" in (candidate, reference):
            assert found != "parity"


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_whole_audits_are_arbitrated(comparison: Agreement) -> None:
    for candidate, reference in itertools.product(("clean", "guilty"), repeat=2):
        assert verdict(comparison, False, candidate, reference) == arbitrate(
            comparison, audit_verdict(AUDITS[candidate]), audit_verdict(AUDITS[reference])
        )


def test_a_difference_is_one_even_when_nobody_knows_whose() -> None:
    for candidate, reference in itertools.product((*OPEN, "clean"), OPEN):
        assert verdict("differ", False, candidate, reference) == "divergence"


def test_only_an_engine_that_was_looked_at_is_vouched_for() -> None:
    for side in SIDES:
        other = "reference" if side == "candidate" else "candidate"
        assert vouched(side, {side: LOGITS, other: CLEAN}, True)  # type: ignore[dict-item]
        assert not vouched(side, {side: LOGITS, other: CLEAN}, False)  # type: ignore[dict-item]
        assert not vouched(side, {side: None, other: CLEAN}, True)  # type: ignore[dict-item]
        assert not vouched(side, {side: GUILTY, other: CLEAN}, True)  # type: ignore[dict-item]
        assert not vouched(side, {side: LOGITS, other: LOGITS}, True)  # type: ignore[dict-item]


def test_receipts_from_before_the_audit_are_taken_for_what_they_show() -> None:
    assert decide("agree", True, None) == "parity"
    assert decide("agree", False, None) == "incomplete"
    assert decide("differ", False, None) == "divergence"
    assert decide("not_compared", True, None) == "incomplete"
