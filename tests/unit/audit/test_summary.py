"""Rows of an audit: the same verdict as the checks they are made of, whatever those are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossval.audit import summary
from crossval.audit.checks import AuditResult, OpCheck, Worst, decide, first_guilty

TAPS = ("inp_embd", "blk.0.q", "blk.0.kq", "blk.1.ffn_down", "result_output")


def check(status: Any = "ok", tap: str = "blk.0.q", index: int = 0, **changes: Any) -> OpCheck:
    facts: dict[str, Any] = {
        "ok": {"ratio": 0.5, "n_beyond": 0},
        "guilty": {"ratio": 7.0, "n_beyond": 3},
        "invalid": {"ratio": None, "n_beyond": 0},
        "unchecked": {"ratio": None, "n_beyond": 0},
    }[status]
    if status in ("ok", "guilty"):
        facts["worst"] = Worst(index, (1,), 1.0, 1.0 + facts["ratio"], 1.0)
    kind = "decode" if index else "prefill"
    return OpCheck(index, kind, tap, status, n_elements=10, **{**facts, **changes})  # type: ignore[arg-type]


def result(*checks: OpCheck, n_ops: int | None = None, n_covered: int | None = None) -> AuditResult:
    n_ops = len(checks) if n_ops is None else n_ops
    n_covered = sum(c.status != "unchecked" for c in checks) if n_covered is None else n_covered
    first = first_guilty(checks)
    return AuditResult("engine", checks, n_ops, n_covered, first, decide(checks, n_ops, n_covered))


def row_of(*checks: OpCheck) -> summary.AuditRow:
    (row,) = summary.rows_of(result(*checks))
    return row


def test_a_row_counts_all_passes_and_shows_the_worst() -> None:
    row = row_of(check(flips=1), check(index=1, ratio=0.9, note="n", reading="r", flips=2), check(index=2))
    assert (row.n_passes, row.n_elements, row.n_ops, row.n_beyond, row.flips) == (3, 30, 3, 0, 3)
    assert (row.ratio, row.status, row.note, row.reading, row.first_beyond) == (0.9, "ok", "n", "r", None)
    assert row.worst is not None
    assert (row.worst.pass_index, row.worst.pass_kind, row.worst.token) == (1, "decode", 1)


def test_the_first_guilty_pass_is_kept_beside_the_worst() -> None:
    row = row_of(check(), check("guilty", index=1, ratio=2.0), check("guilty", index=2, ratio=9.0))
    assert (row.first_beyond, row.ratio, row.n_beyond, row.status) == (1, 9.0, 6, "guilty")
    assert row.worst is not None
    assert row.worst.pass_index == 2


def test_a_bound_of_zero_exceeded_has_no_ratio_and_is_the_worst() -> None:
    row = row_of(check("guilty", ratio=100.0), check("guilty", index=1, ratio=None))
    assert (row.ratio, row.status) == (None, "guilty")
    assert row.worst is not None
    assert row.worst.pass_index == 1


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (("ok", "unchecked"), "unchecked"),
        (("ok", "invalid"), "invalid"),
        (("invalid", "unchecked"), "invalid"),
        (("guilty", "invalid"), "guilty"),
        (("ok", "ok"), "ok"),
    ],
)
def test_one_bad_pass_marks_the_row(states: tuple[str, ...], status: str) -> None:
    row = row_of(*(check(state, index=index) for index, state in enumerate(states)))
    assert row.status == summary.status_of(row) == status


@pytest.mark.parametrize(
    "lie",
    [
        {"n_elements": 0},
        {"n_passes": 0},
        {"ratio": None},
        {"ratio": 1.5},
        {"ratio": math.nan},
        {"n_beyond": 1},
        {"n_invalid": 1},
        {"n_unchecked": 1},
    ],
)
def test_status_is_judged_from_the_numbers(lie: dict[str, Any]) -> None:
    assert summary.status_of(replace(row_of(check()), **lie)) != "ok"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_never_reach_json(bad: float) -> None:
    made = result(check("guilty", worst=Worst(0, (1,), bad, 1.0, 1.0)))
    audit = summary.to_json(made)
    json.dumps(audit, allow_nan=False)
    assert audit["verdict"] == "guilty"
    assert audit["rows"][0]["worst"] is audit["first_guilty"]["worst"] is None


def test_rows_survive_the_round_trip() -> None:
    made = result(*(check(tap=tap, index=index) for index in range(2) for tap in TAPS))
    audit = json.loads(json.dumps(summary.to_json(made)))
    assert [summary.row_from_json(row) for row in audit["rows"]] == summary.rows_of(made)
    assert [row["tap"] for row in audit["rows"]] == list(TAPS)


def test_a_missing_audit_is_incomplete() -> None:
    assert summary.audit_verdict(None) == "incomplete"


def test_the_first_guilty_operation_is_spelt_out() -> None:
    found = summary.to_json(result(check(), check("guilty", "blk.1.ffn_down", 1)))["first_guilty"]
    assert (found["layer"], found["op"], found["pass_index"], found["pass_kind"]) == (1, "ffn_down", 1, "decode")
    assert (found["ratio"], found["status"], found["worst"]["token"]) == (7.0, "guilty", 1)


STATES = st.sampled_from(["ok", "ok", "ok", "guilty", "invalid", "unchecked"])


@given(data=st.data())
def test_rows_say_what_the_checks_say(data: st.DataObject) -> None:
    keys = [(index, tap) for index in range(3) for tap in TAPS]
    chosen = data.draw(st.sets(st.sampled_from(keys)))
    checks = [check(data.draw(STATES), tap, index) for index, tap in keys if (index, tap) in chosen]
    made = result(*checks, n_ops=data.draw(st.sampled_from([len(checks), len(keys)])))
    rows = summary.rows_of(made)
    audit = summary.to_json(made)
    assert summary.verdict_of(rows, made.n_ops, made.n_covered) == made.verdict
    assert summary.audit_verdict(audit) == audit["verdict"] == made.verdict
    first = made.first_guilty
    assert summary.first_place(rows) == (None if first is None else (first.pass_index, first.tap))
