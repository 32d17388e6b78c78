"""Audits, diagnoses and advice in words: what is shown is what the receipt says."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest

from crossval.audit import summary
from crossval.audit.checks import OpCheck
from crossval.audit.show import audit_line, cause, wrong_line
from crossval.console import console
from crossval.examine.verdict import ADVICE
from crossval.model import taps
from crossval.receipts import file as receipt
from crossval.registry import show_receipt
from tests.support import receipt_samples as samples

GUILTY = samples.audit_result({(1, "blk.1.ffn_act"): 8.0, (1, "blk.1.ffn_out"): 9.0})


def shown(made: receipt.Receipt) -> str:
    out = io.StringIO()
    show_receipt(console(out), made)
    return out.getvalue()


def test_a_clean_engine_is_a_count_and_its_worst_operation() -> None:
    text = shown(samples.layers_receipt())
    expected = "129 of 129 operations within their bounds, worst 0.5 of its bound (blk.0.attn_norm); 3 int8 values"
    assert f"candidate  bitnet_py   {expected}" in text
    assert f"reference  bitnet.cpp  {expected}" in text
    assert "diagnosis" not in text


def test_a_guilty_operation_is_named_with_both_values() -> None:
    made = samples.layers_receipt(held=samples.audits(GUILTY))
    text = shown(made)
    assert (
        "candidate  bitnet_py   WRONG  layer 1, op ffn_act (pass 1, decode); position 3, feature 255: "
        "recorded 1.50000763, expected 1.5, 8 times the bound; 2 of 256 values exceed it; "
        "1 more tensors exceed their bounds\n"
    ) in text
    assert "reference  bitnet.cpp  129 of 129 operations" in text
    assert (
        "diagnosis  candidate: skipped (norms): The norm is skipped; fits to 1e-08, the specification to 0.25, "
        "next best (doubled) to 0.5\n"
    ) in text
    assert "reproduce  crossval layers --prompt 'What is 2+2?' --repro repro\n" in text
    assert "CANDIDATE_DEFECT  bitnet_py against bitnet.cpp" in text


def test_the_order_is_finding_diagnosis_verdict_advice() -> None:
    text = shown(samples.layers_receipt(held=samples.audits(GUILTY)))
    marks = ["WRONG", "diagnosis", "reproduce", "CANDIDATE_DEFECT", "meaning", "next step"]
    assert [text.index(mark) for mark in marks] == sorted(text.index(mark) for mark in marks)


@pytest.mark.parametrize(
    ("held", "errors", "verdict"),
    [
        (samples.audits(), {}, "parity"),
        (samples.audits(GUILTY), {}, "candidate_defect"),
        (samples.audits(None, GUILTY), {}, "reference_defect"),
        (samples.audits(GUILTY, GUILTY), {}, "shared_deviation"),
        (samples.audits(GUILTY, GUILTY), {(0, "result_norm"): 0.9}, "both_differ"),
        (samples.audits(), {(0, "result_norm"): 0.9}, "divergence"),
        ({**samples.audits(), "candidate": None}, {}, "incomplete"),
    ],
)
def test_every_verdict_says_what_it_means_and_what_to_do(held: Any, errors: Any, verdict: Any) -> None:
    made = samples.layers_receipt(errors, held)
    assert made["verdict"] == verdict
    text = shown(made)
    assert f"{verdict.upper()}  bitnet_py against" in text
    assert f"meaning    {ADVICE[verdict].meaning}\nnext step  {ADVICE[verdict].next_step}\n" in text


def test_an_engine_that_was_not_audited_is_called_so() -> None:
    text = shown(samples.layers_receipt(held={**samples.audits(), "candidate": None}))  # type: ignore[dict-item]
    assert "candidate  bitnet_py   not audited\n" in text


def test_a_coarse_trace_says_what_was_looked_at_one_by_one() -> None:
    outline = samples.audit_result(names=taps.of_model(2, outline=True))
    assert audit_line(summary.to_json(outline), 2).startswith(
        "9 of 129 operations checked one by one, 120 inside 6 segments, all within their bounds, worst 0.5 of its "
        "bound (blk.0.l_out)"
    )


def first(check: OpCheck) -> dict[str, Any]:
    return summary.check_to_json(check)


def test_other_guilty_operations() -> None:
    plan = samples.PLAN[0]
    segment = first(samples.audit_check("blk.1.l_out", 0, plan, 3.0, 20))
    assert wrong_line(segment) == (
        "layer 1, op l_out (pass 0, prefill), the last of 20 operations checked as one; position 2, feature 127: "
        "recorded 1.50000286, expected 1.5, 3 times the bound; 2 tokens exceed it"
    )
    exact = first(samples.audit_check("inp_embd", 0, plan, None))
    assert "op inp_embd (pass 0, prefill); position 2, feature 127: recorded 2.5, expected 1.5, which has" in (
        wrong_line(exact)
    )
    scores = first(samples.audit_check("blk.0.kq", 0, plan, 3.0))
    assert "position 2, head 1, key 2: recorded" in wrong_line(scores)
    heads = first(samples.audit_check("blk.0.v", 0, plan, 3.0))
    assert "position 2, head 0, feature 63: recorded" in wrong_line(heads)
    assert wrong_line(heads).endswith("2 of 192 values exceed it; 1 int8 flips explained")
    invalid = dataclasses.replace(
        samples.audit_check("blk.0.q", 0, plan, 3.0),
        status="invalid",
        ratio=None,
        worst=None,
        n_beyond=0,
        note="7 of 384 values are not finite",
    )
    assert wrong_line(first(invalid)) == "layer 0, op q (pass 0, prefill); 7 of 384 values are not finite"


def test_what_could_not_be_judged_is_said() -> None:
    checks = list(samples.audit_result().checks)
    checks[3] = dataclasses.replace(checks[3], status="unchecked", ratio=None, worst=None, note="no input")
    result = dataclasses.replace(samples.audit_result(), checks=tuple(checks), n_covered=128)
    text = audit_line(summary.to_json(result), 2)
    assert text.startswith("128 of 129 operations within their bounds, worst")
    assert text.endswith("; not judged: blk.0.k: no input")


def test_an_undetermined_cause_names_nothing() -> None:
    found = samples.diagnosis_of("candidate", summary.to_json(GUILTY), name="undetermined", family=None)
    assert cause(found) == "undetermined: The norm is skipped."


def test_engines_cannot_drive_the_terminal_through_a_diagnosis() -> None:
    made = samples.layers_receipt(held=samples.audits(GUILTY))
    made["diagnosis"][0]["explanation"] = made["audit"]["candidate"]["first_guilty"]["note"] = "\x1b[2J"
    made["audit"]["candidate"]["first_guilty"]["status"] = "invalid"
    assert "\x1b" not in shown(made)
