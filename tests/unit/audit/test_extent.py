"""A mistake in a segment is a range: which layers and operations, and what to record; never more than is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from crossval import registry
from crossval.audit import extent
from crossval.audit import receipt_checks as consistency
from crossval.audit.checks import OpCheck
from crossval.diagnose import segment as segment_diagnosis
from crossval.examine.advice import advice_of
from crossval.model import taps
from crossval.receipts import file as receipt
from tests.support.strangers import PROMPT, Fault, run

Record = Callable[..., Path]
THIRD = ["inp_embd", "blk.2.l_out", "blk.5.l_out", "result_norm", "result_output"]
"""Every third layer's output."""


def check(tap: str, *spans: str) -> OpCheck:
    return OpCheck(0, "prefill", tap, "guilty", 2.0, 1, 1, n_ops=1 + len(spans), spans=spans)


def between(first: str, last: str) -> list[str]:
    every = taps.of_model(9)
    return every[every.index(first) : every.index(last)]


@pytest.mark.parametrize(
    ("tap", "first", "where", "record"),
    [
        ("blk.8.l_out", "blk.6.attn_norm", "layers 6 to 8, up to op l_out", "l_out of layers 6 and 7"),
        ("blk.8.kq", "blk.5.attn_norm", "layers 5 to 8, up to op kq", "l_out of layers 5 to 7"),
        ("blk.3.l_out", "blk.3.attn_norm", "layer 3, ops attn_norm to l_out", "every tap of layer 3"),
        ("blk.3.ffn_out", "blk.3.ffn_act", "layer 3, ops ffn_act to ffn_out", "ffn_act of layer 3"),
        ("blk.3.kqv_out", "blk.3.kq", "layer 3, ops kq to kqv_out", "blk.3.kq and blk.3.kq_soft_max"),
        ("blk.0.attn_norm", "inp_embd", "from op inp_embd to layer 0, op attn_norm", "inp_embd"),
        ("result_output", "result_norm", "ops result_norm to result_output", "result_norm"),
        ("result_norm", "blk.7.ffn_down", "layers 7 to 8, up to op result_norm", "l_out of layers 7 and 8"),
    ],
)
def test_a_segment_is_a_range(tap: str, first: str, where: str, record: str) -> None:
    segment = extent.of_check(check(tap, *between(first, tap)))
    assert segment is not None
    name = taps.parse(tap)
    assert extent.where({"layer": name.layer, "op": name.tap, "segment": segment}) == where
    assert extent.narrower(segment) == record


def test_one_operation_is_its_own_place() -> None:
    assert extent.of_check(check("blk.1.q")) is None
    assert extent.where({"layer": 1, "op": "q"}) == "layer 1, op q"


@pytest.mark.parametrize(
    ("tap", "after", "where"),
    [
        ("blk.1.l_out", "blk.1.ffn_down", "layer 1, op l_out"),
        ("blk.1.l_out", "blk.0.l_out", "layer 1, ops attn_norm to l_out"),
        ("blk.5.l_out", "blk.2.l_out", "layers 3 to 5, up to op l_out"),
        ("inp_embd", None, "op inp_embd"),
        ("blk.0.l_out", None, "from op inp_embd to layer 0, op l_out"),
        ("result_norm", "blk.5.l_out", "op result_norm"),
    ],
)
def test_what_lies_behind_the_tap_compared_before(tap: str, after: str | None, where: str) -> None:
    name, lacking = taps.parse(tap), set(taps.OPS) - set(taps.of_graph("bitnet"))
    found = {"layer": name.layer, "op": name.tap, "segment": extent.between(tap, after, 6, lacking)}
    assert extent.where(found) == where


@pytest.fixture
def deep(make_model: Callable[..., Path]) -> Path:
    return make_model(n_layers=6)


@pytest.fixture(scope="module")
def found_between(
    make_model: Callable[..., Path], record: Record, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, receipt.Receipt]:
    """What ``diff`` says of a mistake in layer 4 of six, where every third layer's output was recorded."""
    model, out = make_model(n_layers=6), tmp_path_factory.mktemp("range") / "r.json"
    wrong = record("other", Fault(rolled_from="4/ffn_sub_norm"), model=model, taps=THIRD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_diagnosis, "MOST_WORK", 0)
        result = run("diff", wrong, record(model=model), "--model", model, "--receipt", out)
    return result, receipt.read(out)


def test_a_mistake_between_coarse_taps_is_a_range_of_layers(
    found_between: tuple[Result, receipt.Receipt],
) -> None:
    result, made = found_between
    assert result.exit_code == 1, result.output
    assert made["verdict"] == "candidate_defect"
    segment = {"first_layer": 3, "last_layer": 5, "first_op": "blk.3.attn_norm"}
    record_these = ["blk.3.l_out", "blk.4.l_out"]
    assert made["audit"]["candidate"]["first_guilty"]["segment"] == {**segment, "record": record_these}
    assert made["diagnosis"][0]["segment"] == {**segment, "record": record_these}
    place = "layers 3 to 5, up to op l_out (pass 0, prefill)"
    assert (
        f"WRONG  {place}, the last of 60 operations checked as one; record l_out of layers 3 and 4"
        in result.stdout
    )
    assert "everything before it is correct" not in result.stdout
    assert (
        "next step  Fix the error in layers 3 to 5, up to op l_out, in the candidate; what precedes it was "
        "judged in segments, not operation by operation."
    ) in result.stdout
    assert f"first divergence: {place.removesuffix(')')}, worst at position" in result.stdout
    assert "layer 5, op l_out" not in result.stdout
    checks = {check.name: check.passed for check in registry.judge(made)}
    assert (checks["audits"], checks["summary"]) == (True, True)


@pytest.mark.usefixtures("unnamed_segments")
def test_triage_says_the_range_too(deep: Path, record: Record) -> None:
    wrong = record("other", Fault(rolled_from="4/ffn_sub_norm"), model=deep, taps=THIRD)
    args = ("--prompt", PROMPT, "--model", deep, "--candidate", wrong, "--reference", record(model=deep))
    result = run("triage", *args)
    assert result.exit_code == 1, result.output
    assert "differs by more than rounding from layers 3 to 5, up to op l_out (pass 0, prefill) on" in result.stdout
    assert "1. Fix layers 3 to 5, up to op l_out (pass 0, prefill) in other; what precedes" in result.stdout
    assert "everything before it is correct" not in result.stdout


def test_everything_before_it_is_right_only_where_it_was_looked_at(
    model_path: Path, record: Record, tmp_path: Path
) -> None:
    wrong = record("other", Fault(rolled_from="1/ffn_sub_norm"))
    result = run("diff", wrong, record(), "--model", model_path)
    assert (
        "next step  Fix the operation named above in the candidate; everything before it is correct."
        in result.stdout
    )
    fused = [name for name in taps.of_model(2) if taps.parse(name).tap != "attn_norm"]
    wrong = record("other", Fault(rolled_from="1/ffn_sub_norm"), taps=fused)
    result = run("diff", wrong, record(), "--model", model_path)
    assert "candidate; what precedes it was judged in segments, not operation by operation." in result.stdout


def test_operations_inside_segments_are_counted_apart(model_path: Path, record: Record, tmp_path: Path) -> None:
    fused = [name for name in taps.of_model(2) if taps.parse(name).tap != "ffn_act"]
    out = tmp_path / "r.json"
    result = run("diff", record("other", taps=fused), record(), "--model", model_path, "--receipt", out)
    assert result.exit_code == 0, result.output
    rows = {row["tap"]: row for row in receipt.read(out)["audit"]["candidate"]["rows"]}
    assert rows["blk.0.ffn_out"]["n_segments"] == 3
    assert rows["blk.0.ffn_up"]["n_segments"] == 0
    counts = "117 of 129 operations checked one by one, 12 inside 6 segments, all within their bounds"
    assert f"candidate  other       {counts}" in result.stdout
    said = "agree with each other, and with the specification as far as they were checked: candidate: "
    assert f"{said}{counts}; reference: 129 of 129 operations within their bounds." in result.stdout
    assert "and with the specification." not in result.stdout


def test_a_divergence_may_sit_inside_a_segment(model_path: Path, record: Record, tmp_path: Path) -> None:
    """Two engines that differ, and nothing is guilty: made from a receipt, as right engines cannot be had so."""
    out = tmp_path / "r.json"
    run(
        "diff",
        record("other", taps=taps.of_model(2, outline=True)),
        record(),
        "--model",
        model_path,
        "--receipt",
        out,
    )
    made = receipt.read(out)
    said = advice_of({**made, "verdict": "divergence"})
    assert "or segment of each is within its bounds" in said.meaning
    assert said.next_step.endswith("or inside a segment: record every tap to look into it.")
    run("diff", record("other"), record(), "--model", model_path, "--receipt", out)
    assert "segment" not in advice_of({**receipt.read(out), "verdict": "divergence"}).next_step


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"first_layer": 4}, "its segment spans layers (4, 5), its taps (3, 5)"),
        ({"record": ["blk.5.l_out", "result_norm"]}, "its segment does not end at it"),
        ({"first_op": "blk.9.q"}, "its segment names taps the model lacks"),
    ],
)
def test_the_gate_sees_a_range_that_does_not_fit(
    found_between: tuple[Result, receipt.Receipt], change: dict[str, object], complaint: str
) -> None:
    made = copy.deepcopy(found_between[1])
    for found in (made["audit"]["candidate"]["first_guilty"], made["diagnosis"][0]):
        found["segment"].update(change)
    assert any(complaint in what for what in consistency.complaints(made))
