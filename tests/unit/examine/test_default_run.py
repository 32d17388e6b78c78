"""The run with flash attention in a ``layers`` receipt: part of the verdict, checked like a receipt of its own."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from crossval.examine.layers_receipt import DEFAULT_RUN, LAYERS, DefaultRun, Examined
from crossval.examine.layers_show import show_layers
from crossval.examine.triage import explain
from crossval.model import taps
from crossval.passes import Numerics
from crossval.receipts import kind
from crossval.receipts.file import Receipt
from crossval.receipts.gate import judge
from crossval.receipts.party import Party
from crossval.receipts.policy import Policy
from tests.support.receipt_samples import OURS, THEIRS, audit_result, audits, context, forge, layers_result
from tests.support.receipt_samples import floors_of as floors_of_result

OFF = Numerics(8, False, generation="main", flash_attention=False)
ON = dataclasses.replace(OFF, flash_attention=True, attention_threads=2)
PLACE = (0, "blk.1.l_out")


def receipt_of(run: Examined | None, **changes: Any) -> Receipt:
    """A receipt of two engines that were captured without flash attention, bit-identical there."""
    parties = {
        side: Party("live", dataclasses.replace(one, numerics=OFF))
        for side, one in (("candidate", OURS), ("reference", THEIRS))
    }
    default_run = None if run is None else DefaultRun(dict.fromkeys(parties, ON.to_json()), run, True)
    found = Examined(layers_result(), audits(), default_run=default_run)
    return kind.build(LAYERS, found, context(**{**parties, **changes}))


def run_of(errors: dict[tuple[int, str], float] | None = None) -> Examined:
    names = [tap for tap in taps.of_model(2) if taps.parse(tap).tap not in ("kq", "kq_soft_max")]
    return Examined(layers_result(errors), audits(audit_result(names=names), audit_result(names=names)))


def failures(receipt: Receipt) -> list[str]:
    return [check.name for check in judge(LAYERS, receipt, Policy()) if not check.passed]


def test_parity_needs_both_runs():
    receipt = receipt_of(run_of())
    assert receipt["verdict"] == "parity"
    assert failures(receipt) == []
    assert receipt[DEFAULT_RUN]["verdict"] == "parity"


def test_a_default_run_that_differs_is_a_divergence():
    receipt = receipt_of(run_of({PLACE: 0.5}))
    assert receipt["first_divergence"] is None  # of what was captured without flash attention
    assert receipt["verdict"] == "divergence"
    assert receipt[DEFAULT_RUN]["first_divergence"]["tap"] == PLACE[1]
    assert "verdict" in failures(receipt)
    console = Console(record=True, width=120, file=io.StringIO())
    show_layers(console, receipt)
    assert "first divergence: layer 1" in console.export_text()
    assert any("flash attention" in text for label, text in explain(receipt) if label == "seen in")


def test_a_live_capture_without_flash_attention_needs_a_default_run():
    assert "default run" in failures(receipt_of(None))


def test_what_engines_without_flash_attention_wrote_needs_none():
    facts = {"candidate": Party("live", OURS), "reference": Party("live", THEIRS)}
    receipt = kind.build(LAYERS, Examined(layers_result(), audits()), context(**facts))
    assert "default run" not in failures(receipt)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "agrees_within"),
        (("numerics", "reference", "flash_attention"), False),
        (("coverage", "compared"), 1),
        (("results", "passes", 0, "token_ids"), [1, 17, 43]),
        (("audit", "reference", "verdict"), "within"),
        (("results", "rows", 3, "n_elements"), 5),
    ],
    ids=lambda one: ".".join(map(str, one)) if isinstance(one, tuple) else None,
)
def test_a_default_run_that_contradicts_itself_fails_the_gate(path: tuple[Any, ...], value: Any):
    receipt = receipt_of(run_of())
    assert failures(Receipt(forge(copy.deepcopy(receipt), DEFAULT_RUN, *path, value))) != []


def test_the_verdict_cannot_be_better_than_the_default_run():
    receipt = receipt_of(run_of({PLACE: 0.5}))
    assert failures(Receipt(forge(copy.deepcopy(receipt), "verdict", "parity"))) != []


def test_floors_stay_with_the_captured_run():
    result = layers_result()
    found = Examined(
        result, audits(), views={"floors": floors_of_result(result)},
        default_run=DefaultRun({"candidate": ON.to_json(), "reference": ON.to_json()}, run_of(), True),
    )  # fmt: skip
    facts = context()
    facts = dataclasses.replace(facts, settings={**facts.settings, "floors": True})
    assert failures(kind.build(LAYERS, found, facts)) == []
