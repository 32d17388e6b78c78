"""The tables of ``crossval greedy``: one screen, however many prompts."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest

from crossval import schema
from crossval.compare import rows as compare
from crossval.console import console
from crossval.examine import greedy_show as render_greedy
from crossval.examine.greedy_receipt import GREEDY, SAME_ARITHMETIC, GreedyExamined
from crossval.model import tolerance
from crossval.receipts.kind import build, recompute
from crossval.registry import show_receipt
from tests.support import receipt_samples as samples

SCREEN = 45


def shown(n_prompts: int, n_differ: int, n_steps: int = 3, from_journal: int | None = None) -> str:
    prompts = []
    for index in range(n_prompts):
        one = samples.greedy_result(n_steps, 1 if index < n_differ else None).prompts[0]
        prompts.append(dataclasses.replace(one, text=f"prompt {index}"))
    found = compare.GreedyResult(tuple(prompts), tolerance.describe("same"), from_journal)
    settings = {"n_threads": 2, "n_decode": None, "n_steps": n_steps, "full": None}
    made = build(GREEDY, GreedyExamined(found, {}), samples.context(settings=settings, text="prompt 0"))
    assert recompute(GREEDY, made)["parity"]["logits_exact_match_rate"] is not None
    assert made["results"].get("from_journal") == from_journal
    schema.validate(made)
    out = io.StringIO()
    show_receipt(console(out), made)
    return out.getvalue()


def cells(text: str, label: str) -> list[str]:
    """Return the words of the line of a step, or of a range of steps."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{label} ") and ":" not in line]
    return line.split()[2:]


def test_few_prompts_are_all_listed() -> None:
    text = shown(render_greedy.MAX_PROMPT_LINES, 0)
    assert all(f" prompt {index} " in text for index in range(render_greedy.MAX_PROMPT_LINES))
    assert "not listed" not in text


def test_of_many_prompts_only_those_that_differ_are_listed() -> None:
    text = shown(60, 2, from_journal=7)
    assert " prompt 1 " in text
    assert " prompt 2 " not in text
    assert "58 of 60 prompts agree and are not listed." in text
    assert "from the journal: 7 of 60 prompts" in text
    assert len(text.splitlines()) <= SCREEN


def test_many_prompts_that_differ_stay_one_screen() -> None:
    text = shown(60, 50, n_steps=40)
    assert f"{50 - render_greedy.MAX_PROMPT_LINES} more prompts differ or are incomplete" in text
    assert "10 of 60 prompts agree" in text
    assert len(text.splitlines()) <= SCREEN


def test_rates_are_given_step_by_step() -> None:
    text = shown(20, 5, n_steps=7)
    assert cells(text, "steps 2-3") == ["40", "40", "100", "%", "40", "100", "%", "100", "%", "="]
    assert cells(text, "steps 4-6")[:2] == ["60", "60"]
    assert cells(text, "step 1")[:8] == ["20", "15", "75.00", "%", "15", "75.00", "%", "87.50"]
    assert "96.43 % of the tokens equal, 98.21 % of the logits bit-equal" in text


CLEAN = samples.summary.to_json(samples.audit_result(plan=samples.GREEDY_PLAN))
GUILTY = samples.summary.to_json(samples.audit_result({(0, "blk.0.q"): 40.0}, plan=samples.GREEDY_PLAN))
COARSE = samples.coarse_audit()
TOKENS = "100 % of the tokens equal"
BITS = f"{TOKENS}; all logits are bit-equal"
DIFFER = f"{TOKENS}; {SAME_ARITHMETIC}"
WITHIN = f"{TOKENS}; the logits agree within their bounds"
APART = {"policy": "independent", "inexact_at": 0}
SAME = {"inexact_at": 0}
CONCLUSIONS = (
    (CLEAN, CLEAN, {}, f"{BITS}; every operation of both engines is correct", "If the text"),
    (CLEAN, COARSE, {}, f"{BITS}; every operation of the candidate is", "If the text"),
    (
        COARSE,
        COARSE,
        {},
        f"{BITS}; the arithmetic agrees with the model's definition within 0.12; not",
        "Record every tap of the candidate and of the",
    ),
    (None, None, {}, "logits bit-equal; arithmetic not audited.", "Run it again without --no-audit"),
    (CLEAN, CLEAN, APART, f"{WITHIN}; every operation of both", "If the text"),
    (
        COARSE,
        CLEAN,
        APART,
        f"{WITHIN}; the arithmetic agrees with the model's definition within 0.12; not",
        "Record every tap of the candidate (inp_embd, ",
    ),
    (CLEAN, CLEAN, SAME, f"{DIFFER}; every operation of both", "One of them does not round"),
    (None, None, SAME, f"{DIFFER}; arithmetic not checked.", "Run it again without"),
    (GUILTY, CLEAN, SAME, f"{DIFFER}. The candidate is wrong:", "Fix the operation named"),
    (CLEAN, GUILTY, APART, f"{WITHIN}. The reference is wrong", "Do not change"),
    (GUILTY, GUILTY, SAME, f"{DIFFER}. Both engines differ from the", "Check first what"),
    (GUILTY, COARSE, SAME, f"{DIFFER}. The candidate is wrong:", "Fix the operation named"),
    (
        GUILTY,
        None,
        SAME,
        f"{DIFFER}. The candidate's arithmetic is wrong; the other's is not known.",
        "Fix the operation named above; record every tap of the reference in",
    ),
)


@pytest.mark.parametrize(("candidate", "reference", "changes", "meaning", "next_step"), CONCLUSIONS)
def test_what_is_proven_is_said_in_a_sentence(
    candidate: Any, reference: Any, changes: dict[str, Any], meaning: str, next_step: str
) -> None:
    held: Any = {"candidate": candidate, "reference": reference}
    made = samples.greedy_receipt(held=held, **changes)
    found = render_greedy.conclude(made)
    assert found.meaning.startswith(meaning)
    assert found.next_step.startswith(next_step)
    assert found.next_step.endswith(".")
    out = io.StringIO()
    show_receipt(console(out), made)
    assert f"meaning    {found.meaning}\nnext step  {found.next_step}\n" in out.getvalue()
