"""Inject faults into the engine; the command has to exit 1 and name the layer and the operation."""

from __future__ import annotations

import pytest

import crossval
from crossval.engines.goldens import FULL_PROMPTS
from tests.support.families import each_family
from tests.support.strangers import run
from tests.zoo.engine import all_faults, faulty_library

FAULTS = {
    "sub-norm-skipped:layer=2:op=attn_sub_norm": (2, "attn_sub_norm", "prefill", "norm skipped"),
    "act-relu": (0, "ffn_act", "prefill", "plain ReLU"),
    "rope-position-plus-1:pass=decode": (0, "q_rope", "decode", "position +1"),
    "weight-scale-ignored:op=ffn_down": (0, "ffn_down", "prefill", "weight scale ignored"),
}
"""Fault of the zoo -> where it has to be found, and the name of its cause."""


@each_family
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_engine_is_caught_with_layer_and_op(fault, kernel, golden, tmp_path, monkeypatch):
    layer, op, pass_kind, name = FAULTS[fault]
    monkeypatch.setenv("BITNET_KERNEL", kernel)
    with faulty_library(all_faults()) as select:
        select(fault)
        words = ("layers", "--prompt", FULL_PROMPTS[0], "--reference", golden)
        done = run(*words, "--receipt", tmp_path / "r.json")
    assert done.exit_code == 1, done.output
    receipt = crossval.open_receipt(tmp_path / "r.json")
    assert receipt["candidate"]["settings"]["kernel"] == kernel
    assert (receipt["verdict"], receipt["parity"]["status"]) == ("candidate_defect", "divergence")
    assert receipt["audit"]["reference"]["verdict"] == "clean"
    guilty = receipt["audit"]["candidate"]["first_guilty"]
    assert (guilty["layer"], guilty["op"], guilty["pass_kind"]) == (layer, op, pass_kind)
    (diagnosis,) = receipt["diagnosis"]
    assert (diagnosis["party"], diagnosis["name"]) == ("candidate", name)
    found = receipt["first_divergence"]
    assert (found["tap"], found["pass_kind"]) == (f"blk.{layer}.{op}", pass_kind)
    assert f"diagnosis  candidate: {name}" in done.stdout
    assert f"layer {layer}" in done.stdout
    assert op in done.stdout
