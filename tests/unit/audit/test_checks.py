"""Checks of one engine, and the verdict that follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from crossval.audit.checks import OpCheck, decide


@pytest.mark.parametrize(
    ("states", "n_ops", "verdict"),
    [
        (["ok", "ok"], 2, "clean"),
        ([], 0, "incomplete"),
        ([], 5, "incomplete"),
        (["ok", "ok"], 3, "incomplete"),
        (["unchecked"], 1, "incomplete"),
        (["ok", "within"], 2, "within"),
        (["ok", "invalid"], 2, "guilty"),
        (["guilty", "unchecked"], 3, "guilty"),
    ],
)
def test_a_verdict_needs_checks_of_every_operation(states: list[Any], n_ops: int, verdict: str) -> None:
    checks = [OpCheck(0, "prefill", "blk.0.q", state, None, 1, 0) for state in states]
    assert decide(checks, n_ops, len(checks)) == verdict


def test_a_check_of_no_elements_proves_nothing() -> None:
    assert decide([OpCheck(0, "prefill", "blk.0.q", "ok", 0.0, 0, 0)], 1, 1) == "incomplete"
