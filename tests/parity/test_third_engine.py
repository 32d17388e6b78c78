"""A third engine's trace: the layer from l_out and logits alone, the operation and its cause from every tap."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

import crossval
from tests.support.extra import sampled
from tests.support.strangers import run
from tests.support.third_engine import third_engine

PROMPT = "What is 2+2?"
N_LAYERS = 4
OPERATION = {
    "interleaved-rope": ("q_rope", "interleaved pairs"),
    "no-ffn-sub-norm": ("ffn_sub_norm", "norm skipped"),
    "no-attn-sub-norm": ("attn_sub_norm", "norm skipped"),
    "silu": ("ffn_act", "SiLU"),
    "swapped-kv-heads": ("kq", None),
    "truncating-quantiser": ("q", "truncation"),
}


def receipt_of(model: Path, golden: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Let the third engine record, compare with bitnet.cpp's golden, and return the receipt."""
    ids = json.loads((golden / "trace.json").read_text())["prompt"]["token_ids"]
    third_engine().main([str(model), "--tokens", ",".join(map(str, ids)), "--out", str(out / "trace"), *arguments])
    receipt = out / "receipt.json"
    result = run(
        "layers", "--prompt", PROMPT, "--model", model, "--candidate", out / "trace", "--reference", golden,
        "--receipt", receipt,
    )  # fmt: skip
    data: dict[str, Any] = crossval.open_receipt(receipt)
    expected = {"parity": 0, "incomplete": 3}.get(data["verdict"], 1)
    assert result.exit_code == expected, result.output
    return data


@pytest.mark.parametrize("taps", ["outline", "all"])
def test_a_right_engine_is_parity(shipped_model, golden, tmp_path, taps):
    receipt = receipt_of(shipped_model, golden, tmp_path, "--taps", taps)
    assert receipt["verdict"] == "parity"
    assert receipt["candidate"]["name"] == "third engine"
    assert receipt["audit"]["candidate"]["first_guilty"] is None


def test_int8_ties_inside_a_segment_pass_the_gate(shipped_model, golden, tmp_path):
    """The golden of this prompt has two activations at a tie, in layers of which only the output is recorded."""
    golden = golden.parent / "is-a-whale-larger-than-a-mouse-answer-ye"
    ids = json.loads((golden / "trace.json").read_text())["prompt"]["token_ids"]
    out, receipt = tmp_path / "trace", tmp_path / "receipt.json"
    numbers = ",".join(map(str, ids))
    third_engine().main([str(shipped_model), "--tokens", numbers, "--out", str(out), "--taps", "outline"])
    assert run("diff", out, golden, "--model", shipped_model, "--receipt", receipt).exit_code == 0
    rows = crossval.open_receipt(receipt)["audit"]["reference"]["rows"]
    assert {row["tap"] for row in rows if row["flips"]} == {"blk.1.l_out", "blk.2.l_out"}
    done = run("gate", receipt, "--allow-compute", "recorded")
    assert done.exit_code == 0, done.output


def test_a_right_engine_that_records_little_is_incomplete(shipped_model, golden, tmp_path):
    receipt = receipt_of(shipped_model, golden, tmp_path, "--taps", "few")
    assert receipt["verdict"] == "incomplete"
    assert {skip["tap"] for skip in receipt["coverage"]["skipped"]} == {"inp_embd", "result_norm"}


@pytest.mark.usefixtures("unnamed_segments")
@pytest.mark.parametrize(
    ("mistake", "layer"), sampled(zip(OPERATION, cycle([0, N_LAYERS // 2, N_LAYERS - 1]), strict=False), 2)
)
def test_l_out_and_logits_give_the_layer(shipped_model, golden, tmp_path, mistake, layer):
    arguments = ("--taps", "few", "--mistake", mistake, "--layer", str(layer))
    receipt = receipt_of(shipped_model, golden, tmp_path, *arguments)
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == f"blk.{layer}.l_out"
    assert receipt["audit"]["reference"]["first_guilty"] is None


@pytest.mark.parametrize(("mistake", "layer"), list(zip(OPERATION, cycle([N_LAYERS - 1, 0]), strict=False)))
def test_every_tap_gives_operation_and_cause(shipped_model, golden, tmp_path, mistake, layer):
    arguments = ("--taps", "all", "--mistake", mistake, "--layer", str(layer))
    receipt = receipt_of(shipped_model, golden, tmp_path, *arguments)
    operation, cause = OPERATION[mistake]
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == f"blk.{layer}.{operation}"
    if cause is not None:
        assert receipt["diagnosis"][0]["name"] == cause
