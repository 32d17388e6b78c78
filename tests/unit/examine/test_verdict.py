"""The table of DESIGN: which of three parties is wrong."""

from __future__ import annotations

import itertools

import pytest

from crossval.examine.verdict import ADVICE, arbitrate

TABLE = [
    ("agree", "clean", "clean", "parity"),
    ("agree", "guilty", "guilty", "shared_deviation"),
    ("differ", "clean", "guilty", "reference_defect"),
    ("differ", "guilty", "clean", "candidate_defect"),
    ("differ", "guilty", "guilty", "both_differ"),
    ("differ", "clean", "clean", "divergence"),
    ("agree", "within", "clean", "agrees_within"),
    ("agree", "clean", "within", "agrees_within"),
    ("agree", "within", "within", "agrees_within"),
    ("differ", "within", "clean", "divergence"),
    ("agree", "guilty", "within", "candidate_defect"),
    ("agree", "within", "guilty", "reference_defect"),
    ("agree", "within", "incomplete", "incomplete"),
    ("not_compared", "within", "clean", "incomplete"),
    ("not_compared", "clean", "clean", "incomplete"),
    ("not_compared", "incomplete", "clean", "incomplete"),
    ("agree", "incomplete", "clean", "incomplete"),
    ("agree", "incomplete", "incomplete", "incomplete"),
    # a difference below the comparison's tolerance does not hide a wrong operation
    ("agree", "guilty", "clean", "candidate_defect"),
    ("agree", "clean", "guilty", "reference_defect"),
]


@pytest.mark.parametrize(("comparison", "candidate", "reference", "verdict"), TABLE)
def test_every_row_of_the_table(comparison, candidate, reference, verdict):
    assert arbitrate(comparison, candidate, reference) == verdict
    assert ADVICE[verdict].next_step


@pytest.mark.parametrize(("comparison", "candidate", "reference", "verdict"), TABLE)
def test_a_deviation_takes_the_place_of_agreement_and_of_nothing_else(comparison, candidate, reference, verdict):
    agreement = ("parity", "agrees_within", "divergence")
    expected = "deviates" if verdict in agreement else verdict
    assert arbitrate(comparison, candidate, reference, deviates=True) == expected


def test_parity_needs_everything_compared_and_clean():
    audits = ("clean", "within", "guilty", "incomplete")
    every = itertools.product(("agree", "differ", "not_compared"), audits, audits)
    parities = [case for case in every if arbitrate(*case) == "parity"]
    assert parities == [("agree", "clean", "clean")]
