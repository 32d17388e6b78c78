"""The audits in a receipt: every contradiction has its complaint, and honest audits have none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from crossval import registry, schema
from crossval.audit import receipt_checks as consistency
from crossval.model import taps
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.file import Receipt
from tests.support import receipt_samples as samples

GUILTY_AT = {(1, "blk.1.ffn_act"): 8.0, (2, "blk.1.ffn_act"): 9.0, (2, "blk.1.ffn_out"): 7.0}
ROW = ("audit", "candidate", "rows")
V, KQ, ACT, OUT = (taps.of_model(2).index(f"blk.{tap}") for tap in ("0.v", "0.kq", "1.ffn_act", "1.ffn_out"))


@pytest.fixture(scope="module")
def clean() -> Receipt:
    return samples.layers_receipt()


@pytest.fixture(scope="module")
def guilty() -> Receipt:
    return samples.layers_receipt(held=samples.audits(samples.audit_result(GUILTY_AT)))


def forged(original: Receipt, *edits: tuple[Any, ...]) -> Receipt:
    made = copy.deepcopy(original)
    for *path, last, value in edits:
        place: Any = made
        for part in path:
            place = place[part]
        place[last] = value
    return {**made, "digest": receipt.digest(made)}


def complaints(made: Receipt) -> str:
    return "\n".join(consistency.complaints(made))


@pytest.mark.parametrize(
    "held",
    [
        samples.audits(),
        samples.audits(samples.audit_result(GUILTY_AT)),
        samples.audits(None, samples.audit_result({(0, "inp_embd"): None})),
        samples.audits(
            samples.audit_result(names=taps.of_model(2, outline=True)), samples.audit_result(GUILTY_AT)
        ),
    ],
)
def test_honest_audits_have_no_complaints(held: Any) -> None:
    made = samples.layers_receipt(held=held)
    schema.validate(made)
    assert complaints(made) == ""


def test_the_clean_one_passes_the_gate_and_the_guilty_one_does_not(clean: Receipt, guilty: Receipt) -> None:
    assert gate.passed(registry.judge(clean))
    assert [check.name for check in registry.judge(guilty) if not check.passed] == [
        "verdict",
        "audit of the candidate",
    ]
    assert guilty["verdict"] == "candidate_defect"


@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_a_missing_audit_fails_the_gate(clean: Receipt, side: str) -> None:
    made = samples.build(samples.layers_result(), None, {**samples.audits(), side: None})  # type: ignore[dict-item]
    assert made["verdict"] == "incomplete"
    found = [check.name for check in registry.judge(made) if not check.passed]
    assert found == ["audits", "verdict", f"audit of the {side}"]
    assert complaints(made) == f"the {side} was not audited"


def test_an_audit_of_nothing_is_incomplete() -> None:
    nothing = {"n_ops": 129, "n_covered": 0, "verdict": "incomplete", "first_guilty": None, "rows": []}
    made = samples.layers_receipt(held={**samples.audits(), "reference": nothing})
    assert made["verdict"] == "incomplete"
    assert complaints(made) == ""
    assert "audit of the reference" in [check.name for check in registry.judge(made) if not check.passed]


FORGERIES: dict[str, tuple[tuple[Any, ...], str]] = {
    "status of a row": ((*ROW, 3, "status", "unchecked"), "status is unchecked, its numbers say ok"),
    "tap of no layer": ((*ROW, 3, "tap", "blk.7.q"), "the model has no tap blk.7.q"),
    "tap of another row": ((*ROW, 3, "tap", "blk.1.q"), "repeated or out of execution order"),
    "too many passes": ((*ROW, 3, "n_passes", 4), "4 passes"),
    "no passes": ((*ROW, 3, "n_passes", 0), "0 passes"),
    "more invalid than checked": ((*ROW, 3, "n_invalid", 4), "4 invalid"),
    "fewer operations than checks": ((*ROW, 3, "n_ops", 2), "blk.0.k: 2 operations in 3 checks"),
    "more beyond than there are": ((*ROW, 3, "n_beyond", 10**9), "1000000000 of 320 elements"),
    "a first pass without a reason": ((*ROW, 3, "first_beyond", 1), "first_beyond is 1, 0 elements"),
    "a first pass that is none": ((*ROW, ACT, "first_beyond", 3), "first_beyond is 3 of 3 passes"),
    "a ratio above 1 with nothing beyond": ((*ROW, 3, "ratio", 2.0), "ratio 2 contradicts 0 elements"),
    "another ratio": ((*ROW, 3, "ratio", 0.4), "ratio 0.4 is not"),
    "a negative ratio": ((*ROW, 3, "ratio", -0.5), "ratio -0.5 is not"),
    "elements beyond the shape": ((*ROW, 3, "n_elements", 64 * 6), "elements, the model's shape gives 320"),
    "elements of part of a token": ((*ROW, 3, "n_elements", 65 * 4), "elements, the model's shape gives"),
    "fewer elements than tokens": ((*ROW, 3, "n_elements", 64 * 2), "elements, the model's shape gives"),
    "no worst element": ((*ROW, 3, "worst", None), "a ratio without an element"),
    "flips without int8": ((*ROW, KQ, "flips", 1), "1 int8 flips in an operation without int8"),
    "a pass that is not there": ((*ROW, 3, "worst", "pass_index", 5), "there is no decode pass 5"),
    "a pass of another kind": ((*ROW, 3, "worst", "pass_kind", "prefill"), "there is no prefill pass 2"),
    "a token of another pass": ((*ROW, 3, "worst", "token", 1), "position 1"),
    "an index outside": ((*ROW, 3, "worst", "index", [0, 64]), "index [0, 64] is not in pass"),
    "an index of another rank": ((*ROW, 3, "worst", "index", [0]), "index [0] is not in pass"),
    "no float32": ((*ROW, 3, "worst", "recorded", 0.1), "recorded 0.1 is not a float32"),
    "another expectation": ((*ROW, 3, "worst", "expected", 1.25), "over the bound"),
    "another bound": ((*ROW, 3, "worst", "bound", 1.0), "over the bound 1"),
    "a negative bound": ((*ROW, 0, "worst", "bound", -1.0), "over the bound -1"),
    "a worst check of no operation": ((*ROW, 3, "worst", "n_ops", 0), "its worst check spans 0"),
    "a worst check of several": ((*ROW, 3, "worst", "n_ops", 2), "its worst check spans 2 of the 3 operations"),
    "a reading without a choice": ((*ROW, 3, "reading", "no F16"), "reading 'no F16' is not one"),
    "no reading where one is needed": ((*ROW, KQ, "reading", None), "reading None is not one"),
    "another engine's reading": ((*ROW, KQ, "reading", "k in F16"), "reading 'k in F16' is not one"),
    "operations of another model": (
        ("audit", "candidate", "n_ops", 130),
        "130 operations, 3 passes of this model",
    ),
    "more judged than rows": (("audit", "candidate", "n_covered", 130), "130 operations judged"),
    "fewer judged than rows": (("audit", "candidate", "n_covered", 128), "the rows say 129 to 129"),
    "verdict": (("audit", "candidate", "verdict", "incomplete"), "verdict is incomplete, the rows say clean"),
    "a row gone": ((*ROW[:2], "rows", []), "the rows say 0 to 0"),
    "no passes at all": (("results", "passes", []), "there are no passes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_each_contradiction_has_its_complaint(name: str, clean: Receipt, guilty: Receipt) -> None:
    edit, expected = FORGERIES[name]
    original = guilty if ACT in edit else clean
    made = forged(original, edit)
    assert expected in complaints(made)
    assert not gate.passed(registry.judge(made))


FIRST = ("audit", "candidate", "first_guilty")
FORGED_FIRST: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "none": ([(*FIRST, None)], "first wrong is None, the rows say (1, 'blk.1.ffn_act')"),
    "another operation": ([(*FIRST, "tap", "blk.1.ffn_out")], "the rows say (1, 'blk.1.ffn_act')"),
    "another pass": ([(*FIRST, "pass_index", 2)], "the rows say (1, 'blk.1.ffn_act')"),
    "another layer": ([(*FIRST, "layer", 0)], "layer, operation or kind of pass"),
    "another name": ([(*FIRST, "op", "ffn_out")], "layer, operation or kind of pass"),
    "another kind": ([(*FIRST, "pass_kind", "prefill")], "layer, operation or kind of pass"),
    "called invalid": ([(*FIRST, "status", "invalid")], "status is invalid, its numbers say guilty"),
    "invalid, but no row is": (
        [
            (*FIRST, "status", "invalid"),
            (*FIRST, "n_beyond", 0),
            (*FIRST, "ratio", None),
            (*FIRST, "worst", None),
        ],
        "status is invalid",
    ),
    "ok": ([(*FIRST, "ratio", 0.5)], "its numbers say ok"),
    "more elements than its row": ([(*FIRST, "n_elements", 10**6)], "n_elements is 1000000"),
    "part of a token": ([(*FIRST, "n_elements", 255)], "255 elements"),
    "more beyond than its row": ([(*FIRST, "n_beyond", 5)], "n_beyond is 5, in all passes 4"),
    "more operations than its row": ([(*FIRST, "n_ops", 4)], "n_ops is 4"),
    "flips": ([(*FIRST, "flips", 1)], "flips is 1"),
    "a ratio above the worst": ([(*FIRST, "ratio", 99.0)], "above the worst of all passes"),
    "a ratio of other values": ([(*FIRST, "ratio", 8.5)], "ratio 8.5 is not"),
    "a worst element of another pass": ([(*FIRST, "worst", "pass_index", 2)], "its worst element is of another"),
}


@pytest.mark.parametrize("name", FORGED_FIRST)
def test_the_first_guilty_operation_follows_from_the_rows(name: str, guilty: Receipt) -> None:
    edits, expected = FORGED_FIRST[name]
    assert expected in complaints(forged(guilty, *edits))


WHY = ("diagnosis", 0)
FORGED_DIAGNOSES: dict[str, tuple[tuple[Any, ...], str]] = {
    "none": (("diagnosis", []), "diagnosis is of [], wrong are ['candidate']"),
    "of the other engine": ((*WHY, "party", "reference"), "diagnosis is of ['reference']"),
    "another operation": ((*WHY, "tap", "blk.1.ffn_out"), "tap is blk.1.ffn_out, the first wrong operation's is"),
    "another pass": ((*WHY, "pass_index", 2), "pass_index is 2"),
    "fits no better": ((*WHY, "ratio", 0.25), "fits no better than the specification"),
    "a negative fit": ((*WHY, "ratio", -1.0), "fits no better than the specification"),
    "no fit": ((*WHY, "ratio", None), "fits no better than the specification"),
    "no candidates": ((*WHY, "candidates", []), "fits no better than the specification"),
    "a runner-up as good": ((*WHY, "runner_up_ratio", 1e-9), "its runner-up fits as well"),
    "a runner-up without a name": ((*WHY, "runner_up", None), "only one of runner-up and its ratio"),
    "no family": ((*WHY, "family", None), "names no family"),
}


@pytest.mark.parametrize("name", FORGED_DIAGNOSES)
def test_a_diagnosis_belongs_to_its_finding(name: str, guilty: Receipt) -> None:
    edit, expected = FORGED_DIAGNOSES[name]
    assert expected in complaints(forged(guilty, edit))


FORGED_SEGMENTS: dict[str, tuple[Any, str]] = {
    "no operation": ([], "it names a bug inside a segment, but no operation"),
    "behind the segment": (["blk.1.attn_norm"], "not in order of execution, up to the wrong one"),
    "twice": (["blk.0.q", "blk.0.q"], "not in order of execution, up to the wrong one"),
    "backwards": (["blk.0.k", "blk.0.q"], "not in order of execution, up to the wrong one"),
}


@pytest.mark.parametrize("name", FORGED_SEGMENTS)
def test_a_diagnosis_of_a_segment_says_which_operation_inside(name: str) -> None:
    coarse = samples.audit_result({(0, "blk.0.l_out"): 8.0}, names=taps.of_model(2, outline=True))
    made = samples.layers_receipt(held=samples.audits(coarse))
    assert complaints(made) == ""
    assert complaints(forged(made, (*WHY, "segment_ops", ["blk.0.q_rope", "blk.0.k_rope"]))) == ""
    inside, expected = FORGED_SEGMENTS[name]
    assert expected in complaints(forged(made, (*WHY, "segment_ops", inside)))


def test_an_operation_by_itself_has_none_inside(guilty: Receipt) -> None:
    found = complaints(forged(guilty, (*WHY, "segment_ops", ["blk.0.q"])))
    assert "it names blk.0.q inside a segment" in found


def test_an_undetermined_diagnosis_claims_nothing(guilty: Receipt) -> None:
    nothing = {"name": "undetermined", "family": None, "ratio": None, "candidates": []}
    edits = [(*WHY, field, value) for field, value in nothing.items()]
    assert complaints(forged(guilty, *edits)) == ""


def test_the_first_guilty_operation_is_what_its_row_shows_of_the_same_pass() -> None:
    only = samples.audit_result({(1, "blk.1.ffn_act"): 8.0})
    made = samples.layers_receipt(held=samples.audits(only))
    assert complaints(made) == ""
    assert "not what its row shows" in complaints(forged(made, (*FIRST, "note", "x")))


def test_an_engine_that_does_not_say_how_it_rounds_may_have_any_reading(clean: Receipt) -> None:
    numerics = {"simd_width": None, "fused_quantizer": None}
    made = forged(clean, ("candidate", "numerics", numerics), (*ROW, KQ, "reading", "no F16"))
    assert complaints(made) == ""


def test_the_ratio_of_a_segment_is_of_whole_tokens() -> None:
    outline = samples.audit_result(names=taps.of_model(2, outline=True))
    made = samples.layers_receipt(held=samples.audits(outline))
    assert made["verdict"] == "parity"
    assert complaints(forged(made, (*ROW, 1, "ratio", 0.01))) == ""


def test_a_row_cannot_hide_behind_a_clean_verdict(guilty: Receipt) -> None:
    lies = [("verdict", "parity"), ("audit", "candidate", "verdict", "clean"), (*FIRST, None)]
    found = [check.name for check in registry.judge(forged(guilty, *lies)) if not check.passed]
    assert found == ["summary", "audits", "verdict", "audit of the candidate"]
