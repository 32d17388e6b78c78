"""What bitnet.cpp gets wrong on purpose-built models is reported as its own bug, not as the candidate's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import crossval
from bitnet_py.synth import SynthConfig, write_model
from crossval.engines.model_file import ROWS_NOTE
from crossval.selftest.damage import DamagedModel
from tests.support.strangers import PROMPT, run

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("bitnet_cpp_library")]

ALL_PLUS_ONE = 0b10101010
"""Four weights of +1."""


def receipt_of(model: Path, out: Path) -> tuple[int, dict[str, Any]]:
    result = run(
        "layers", "--prompt", PROMPT, "--model", model, "--reference", "bitnet.cpp", "--receipt", out / "r.json"
    )
    return result.exit_code, crossval.open_receipt(out / "r.json")


@pytest.fixture
def saturated(tmp_path) -> Path:
    """A model whose first layer sums 160 products of 127 and 2 in each 16-bit lane of four rows: 40640."""
    path = tmp_path / "saturated.gguf"
    shape = {"n_layers": 2, "dim": 2560, "n_heads": 20, "n_kv_heads": 5, "hidden_dim": 256, "vocab_size": 301}
    write_model(path, SynthConfig(**shape, seed=3))
    model = DamagedModel(path)
    model.f16("token_embd.weight")[:] = 0.25
    model.f32("blk.0.attn_norm.weight")[:] = 1
    model.packed("blk.0.attn_q.weight")[:4] = ALL_PLUS_ONE
    return path


def test_lanes_that_wrap_are_the_references_defect(saturated, tmp_path):
    code, receipt = receipt_of(saturated, tmp_path)
    assert (code, receipt["verdict"]) == (1, "reference_defect")
    first = receipt["audit"]["reference"]["first_guilty"]
    assert first["tap"] == "blk.0.q"
    assert first["n_beyond"] == 4 * len(receipt["prompt"]["token_ids"])
    assert [(d["party"], d["name"]) for d in receipt["diagnosis"]] == [("reference", "16-bit lanes wrap")]
    assert receipt["audit"]["candidate"]["first_guilty"] is None


def test_a_head_that_is_ignored_is_the_references_defect(make_model, tmp_path):
    code, receipt = receipt_of(make_model(untied_head=True), tmp_path)
    assert (code, receipt["verdict"]) == (1, "reference_defect")
    assert [(d["party"], d["name"]) for d in receipt["diagnosis"]] == [("reference", "head of token_embd.weight")]
    assert any("output.weight" in note for note in receipt["notes"])


def test_rows_that_do_not_fill_a_group_are_announced(make_model, tmp_path):
    model = make_model(dim=128, n_heads=64, n_kv_heads=1, hidden_dim=256)
    code, receipt = receipt_of(model, tmp_path)
    assert ROWS_NOTE.format(rows=2) in receipt["notes"]
    assert receipt["verdict"] in ("parity", "reference_defect")
    assert code == int(receipt["verdict"] != "parity")
