"""Break the engine; the command has to exit 1 and name the layer and the operation."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from crossval.goldens import FULL_PROMPTS
from tests.broken_engine import MISTAKES, build

CROSSVAL = Path(sysconfig.get_path("scripts")) / "crossval"


def layers(golden: Path, library: Path, receipt: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CROSSVAL, "layers", "--prompt", FULL_PROMPTS[0], "--reference", golden, "--receipt", receipt],
        env={**os.environ, "BITNET_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        timeout=240,
    )


NAMES = {
    "attn_sub_norm skipped in layer 2": "norm skipped",
    "plain ReLU": "plain ReLU",
    "scale of the weights forgotten in ffn_down": "weight scale ignored",
    # the mistake is in the cosines only: no position gives these numbers
    "position off by one in decode": "undetermined",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_broken_engine_is_caught_with_layer_and_op(mistake, tmp_path, shipped_model):
    golden = shipped_model.with_suffix(".goldens") / "what-is-2-2"
    done = layers(golden, build(mistake, tmp_path), tmp_path / "receipt.json")
    assert done.returncode == 1, done.stdout + done.stderr
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["verdict"], receipt["parity"]["status"]) == ("candidate_defect", "divergence")
    assert receipt["audit"]["reference"]["verdict"] == "clean"
    guilty = receipt["audit"]["candidate"]["first_guilty"]
    assert (guilty["layer"], guilty["op"], guilty["pass_kind"]) == (mistake.layer, mistake.op, mistake.pass_kind)
    (diagnosis,) = receipt["diagnosis"]
    assert (diagnosis["party"], diagnosis["name"]) == ("candidate", NAMES[mistake.name])
    assert f"diagnosis  candidate: {NAMES[mistake.name]}" in done.stdout
    found = receipt["first_divergence"]
    assert found["tap"] == f"blk.{mistake.layer}.{mistake.op}"
    assert found["pass_kind"] == mistake.pass_kind
    assert f"layer {mistake.layer}" in done.stdout + done.stderr
    assert mistake.op in done.stdout + done.stderr
