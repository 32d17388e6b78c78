"""Engines in bfloat16 and binary16 through the command line: parity with a precision, or a bug located."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crossval.audit import receipt_checks as consistency
from crossval.receipts import file as receipt
from crossval.receipts.gate import passed
from crossval.receipts.policy import Policy
from crossval.registry import judge
from crossval.traces.read import Trace
from tests.support.extra import sampled
from tests.support.narrow_engine import Mistake, NarrowEngine, Style
from tests.support.numpy_bitnet.recorded import write_trace
from tests.support.strangers import error_line, run

PROMPT = "What is 2+2?"
HEALTHY = [
    Style("bf16", scale="narrow", norm="narrow"),
    Style("f16"),
    Style("f32", kv="bf16"),
    Style("f32", kv="f16"),
]
MISTAKES = {
    "ffn_sub_norm skipped": "blk.2.ffn_sub_norm",
    "ffn_norm of another": "blk.2.ffn_norm",
    "kq scale": "blk.2.kq_soft_max",
    "SiLU": "blk.2.ffn_act",
}
FOUND = [
    (style, name)
    for i, style in enumerate(HEALTHY)
    for j, name in enumerate(MISTAKES)
    if i == 0 or (i + j) % 2
]  # fmt: skip


def names(style: Style) -> str:
    return f"{style.compute}-{style.kv}"


@pytest.fixture
def traced(shipped_model: Path, short_golden: Path, tmp_path: Path) -> Any:
    """Return ``traced(style, mistake) -> trace`` of the golden's passes."""

    def make(style: Style, mistake: Mistake | None = None, name: str = "trace") -> Path:
        engine, plan = NarrowEngine(shipped_model, style, mistake), Trace.open(short_golden).info.plan
        return write_trace(engine.record(plan), engine.model, plan[0].token_ids, PROMPT, tmp_path / name)

    return make


def layers(model: Path, short_golden: Path, trace: Path) -> tuple[int, str, dict[str, Any]]:
    """Return exit code, output and receipt of ``crossval layers``."""
    path = trace.with_suffix(".json")
    words = ("--model", model, "--candidate", trace, "--reference", short_golden, "--receipt", path)
    result = run("layers", "--prompt", PROMPT, *words)
    return result.exit_code, result.output, receipt.read(path)


def gate(path: Path, *options: str) -> int:
    return run("gate", path, "--allow-compute", "recorded", *options).exit_code


@pytest.mark.parametrize("style", [s for s in HEALTHY if s.kv is None], ids=names)
def test_a_healthy_engine_is_parity_within_its_precision_which_the_gate_wants_stated(
    shipped_model, short_golden, traced, style
):
    path = traced(style)
    code, output, made = layers(shipped_model, short_golden, path)
    assert (code, made["verdict"]) == (0, "parity")
    assert made["audit"]["candidate"]["precision"]["declared"] is False
    assert made["thresholds"]["policy"] == style.compute
    label = {"bf16": "bfloat16", "f16": "binary16 (F16)"}[style.compute]
    assert f"this engine rounds everything to {label} and does not state so" in output
    assert output.index("this engine rounds") < output.index("Every operation recomputed")
    assert f"comparisons, within {label}" in output
    held = path.with_suffix(".json")
    assert gate(held) == 1
    assert gate(held, "--allow-precision", "f16" if style.compute == "bf16" else "bf16") == 1
    assert gate(held, "--allow-precision", style.compute) == 0


@pytest.mark.parametrize("style", HEALTHY, ids=names)
def test_a_healthy_engine_that_states_its_formats_passes_the_gate(shipped_model, short_golden, traced, style):
    path = traced(replace(style, states=True))
    code, output, made = layers(shipped_model, short_golden, path)
    assert (code, made["verdict"]) == (0, "parity")
    assert made["candidate"]["numerics"]["compute_dtype"] == style.compute
    assert ("precision" in made["audit"]["candidate"]) == (style.compute != "f32")
    assert ("as it states" in output) == (style.compute != "f32")
    assert gate(path.with_suffix(".json")) == 0


@pytest.mark.parametrize(
    ("style", "name"),
    sampled(FOUND, 3, lambda case: case[:1]),
    ids=lambda one: one if isinstance(one, str) else names(one),
)
def test_a_mistake_is_found_where_it_is_at_every_precision(shipped_model, short_golden, traced, style, name):
    """The widest bounds with every mistake, each other precision with two; ``python -m tests.zoo --precisions``
    tries more."""
    path = traced(replace(style, states=style.kv is not None), Mistake(name))
    code, _, made = layers(shipped_model, short_golden, path)
    assert (code, made["verdict"]) == (1, "candidate_defect")
    assert made["audit"]["candidate"]["first_guilty"]["tap"] == MISTAKES[name]
    assert gate(path.with_suffix(".json"), "--allow-precision", "bf16", "--allow-precision", "f16") == 1


@pytest.mark.parametrize(
    ("style", "named"),
    [(Style("f32", activations="none"), "float_activations"), (Style("f32", weights="bf16"), "weights_bf16")],
    ids=["float activations", "weights"],
)
@pytest.mark.parametrize("states", [False, True])
def test_a_deviation_is_a_verdict_of_its_own_which_the_gate_wants_allowed(
    shipped_model, short_golden, traced, style, named, states
):
    path = traced(replace(style, states=states))
    code, output, made = layers(shipped_model, short_golden, path)
    assert (code, made["verdict"]) == (1, "deviates")
    found = made["audit"]["candidate"]["products"]
    assert (found["deviations"], found["declared"]) == ([named], states)
    assert output.index("deviation  candidate: its ") < output.index("Every operation recomputed")
    assert f"crossval gate --allow-deviation {named})" in output
    held = path.with_suffix(".json")
    other = "weights_f16"
    assert [gate(held), gate(held, "--allow-deviation", other), gate(held, "--allow-deviation", named)] == [
        1,
        1,
        0,
    ]
    if states:
        hidden = json.loads(json.dumps(made))
        del hidden["audit"]["candidate"]["products"]
        hidden["verdict"] = made["parity"]["status"]
        assert gate_complains(hidden)


def test_two_traces_differ_only_in_precision(shipped_model, traced):
    ours, theirs = traced(Style("bf16"), name="ours"), traced(Style("f32"), name="theirs")
    result = run("diff", ours, theirs, "--model", shipped_model, "--full")
    assert result.exit_code == 0, result.output
    assert "within bfloat16" in result.output
    wrong = traced(Style("bf16"), Mistake("SiLU", 1), name="wrong")
    result = run("diff", theirs, wrong, "--model", shipped_model)
    assert result.exit_code == 1
    assert "REFERENCE_DEFECT" in result.output
    assert "layer 1, op ffn_act" in result.output


def test_a_trace_with_an_unknown_format_is_refused(shipped_model, traced):
    path = traced(Style("bf16", states=True)) / "trace.json"
    path.write_text(path.read_text().replace('"compute_dtype": "bf16"', '"compute_dtype": "fp8"'))
    result = run("diff", path.parent, path.parent, "--model", shipped_model)
    assert result.exit_code == 4
    assert "compute_dtype" in error_line(result)


EDITS = {
    "declared": True,
    "unit_roundoff": 2.0**-11,
    "n_in_format": 5,
    "n_taps": 2000,
    "n_values": 0,
    "scope": "some",
    "ops": ["q"],
    "dtype": "f16",
    "exceptions": ["blk.0.q"],
}


def test_a_finding_of_precision_cannot_be_edited(shipped_model, short_golden, traced):
    _, _, made = layers(shipped_model, short_golden, traced(Style("bf16")))
    assert not consistency.complaints(made)
    for name, value in EDITS.items():
        edited = json.loads(json.dumps(made))
        edited["audit"]["candidate"]["precision"][name] = value
        assert consistency.complaints(edited), name
    missing = json.loads(json.dumps(made))
    del missing["audit"]["candidate"]["precision"]
    assert gate_complains(missing)
    stated = json.loads(json.dumps(missing))
    stated["candidate"]["numerics"]["compute_dtype"] = "bf16"
    assert any("was not looked at" in what for what in consistency.complaints(stated))
    wider = json.loads(json.dumps(made))
    row = next(row for row in wider["audit"]["candidate"]["rows"] if row["tap"] == "blk.1.l_out")
    row["worst"]["bound"] *= 2
    row["ratio"] /= 2
    assert any("is not one rounding" in what for what in consistency.complaints(wider))


def gate_complains(made: dict[str, Any]) -> bool:
    """Whether a resealed receipt fails with no option but the one that accepts the trace."""
    return not passed(judge(receipt.seal(made), Policy(allow_compute_paths=("recorded",))))
