"""Break the engine; the command has to exit 1 and name the layer and the operation."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

from crossval.traces.goldens import FULL_PROMPTS
from tests.support.broken_engine import MISTAKES, Mistake, build, run
from tests.support.families import each_family
from tests.support.native_build import LIBRARY

CROSSVAL = Path(sysconfig.get_path("scripts")) / "crossval"


@pytest.fixture(scope="module", params=MISTAKES, ids=lambda mistake: mistake.name)
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mistake, Path]:
    mistake: Mistake = request.param
    return mistake, build([mistake], tmp_path_factory.mktemp("broken") / LIBRARY)


def layers(golden: Path, library: Path, kernel: str, receipt: Path) -> subprocess.CompletedProcess[str]:
    words = [CROSSVAL, "layers", "--prompt", FULL_PROMPTS[0], "--reference", golden, "--receipt", receipt]
    return run(words, library, kernel=kernel)


NAMES = {
    "attn_sub_norm skipped in layer 2": "norm skipped",
    "plain ReLU": "plain ReLU",
    "scale of the weights forgotten in ffn_down": "weight scale ignored",
    # the mistake is in the cosines only: no position gives these numbers
    "position off by one in decode": "undetermined",
}


@each_family
def test_broken_engine_is_caught_with_layer_and_op(broken, kernel, tmp_path, shipped_model):
    mistake, library = broken
    golden = shipped_model.with_suffix(".goldens") / "what-is-2-2"
    done = layers(golden, library, kernel, tmp_path / "receipt.json")
    assert done.returncode == 1, done.stdout + done.stderr
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["candidate"]["settings"]["kernel"] == kernel
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
