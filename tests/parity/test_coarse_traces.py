"""Coarse traces through the command line: a mistake is never parity, whatever was recorded.

The engine is ``tests/numpy_bitnet``, which shares no formula with the harness; its mistakes are those that got
parity when a segment of several operations was held to a tolerance of flipped codes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from crossval.model.weights import SpecWeights
from crossval.passes import Numerics
from tests.support.numpy_bitnet.mistakes import MISTAKES, first_place, in_layers
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import only, record, write_trace
from tests.support.recordings import BY_NAME, RECORDINGS, answers
from tests.support.strangers import run

PROMPT = "What is 2+2?"
LAYER = 2
QUANTISER = (
    "float activations", "128 levels", "63 levels", "truncation", "floor", "clamp at 126", "per-tensor scale",
    "float row sum",
)  # fmt: skip
ROUNDED = ("bf16 KV", "F16 RoPE tables", "bf16 RoPE tables")
EVERY_LAYER, ONE_LAYER = None, (LAYER,)
CELLS = [
    *(("every `l_out`", name, EVERY_LAYER) for name in (*QUANTISER, *ROUNDED)),
    *(("every `l_out`", name, ONE_LAYER) for name in
      ("LayerNorm", "another norm's weight", "mask sees the next token", "KQ scale x sqrt 2", *QUANTISER)),
    *(("no norms", name, EVERY_LAYER) for name in
      ("float activations", "128 levels", "truncation", "float row sum", "eps x 10", "V 19 % wrong")),
    *(("no scores", name, EVERY_LAYER) for name in ("KQ scale x 1.05", "KQ scale x sqrt 2", "bf16 KV")),
    *(("no scores", name, ONE_LAYER) for name in ("KQ scale x 1.05", "KQ scale x sqrt 2", "bf16 KV")),
]  # fmt: skip
NOT_PROVABLE: Collection[tuple[str, str, tuple[int, ...] | None]] = frozenset()
"""Cells that end with exit code 3 and the taps to record, because what was recorded does not hold more."""
GREEDY = ("float activations", "clamp at 126", "float row sum", "eps x 10")
LIKE_BITNET_CPP = Numerics(8, False)
pytestmark = pytest.mark.usefixtures("unnamed_segments")


@pytest.fixture(scope="module")
def model(shipped_model) -> Model:
    return Model(shipped_model)


def passes(golden: Path) -> list[list[int]]:
    return [one["token_ids"] for one in json.loads((golden / "trace.json").read_text())["passes"]]


def layers(model: Model, golden: Path, trace: Path, receipt: Path) -> tuple[int, dict[str, Any]]:
    result = run(
        "layers", "--prompt", PROMPT, "--model", model.path, "--candidate", trace, "--reference", golden,
        "--receipt", receipt,
    )  # fmt: skip
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(receipt.read_text())


def write(model: Model, golden: Path, folder: Path, mistakes: list[Any], keeps: Any, **more: Any) -> Path:
    """Let the NumPy engine run the golden's passes and write what is kept of it."""
    prompt, *rest = passes(golden)
    made = record(model, prompt, len(rest), mistakes=mistakes, forced=[token for (token,) in rest], **more)
    return write_trace(only(made, keeps), model, prompt, PROMPT, folder)


@pytest.mark.parametrize("kept", RECORDINGS, ids=lambda kept: kept.name)
def test_the_engine_without_a_mistake_is_no_finding(model, golden, tmp_path, kept):
    code, receipt = layers(
        model, golden, write(model, golden, tmp_path / "t", [], kept.keeps), tmp_path / "r.json"
    )
    assert code in (0, 3), receipt["verdict"]
    if kept.name == "all taps":
        assert (code, receipt["verdict"]) == (0, "parity")


@pytest.mark.parametrize(
    ("kept", "name", "where"), CELLS, ids=lambda value: str(value) if isinstance(value, str) else None
)
def test_a_mistake_is_not_parity(model, golden, tmp_path, kept, name, where):
    mistake = MISTAKES[name] if where is None else in_layers(MISTAKES[name], where)
    keeps = BY_NAME[kept].keeps
    trace = write(model, golden, tmp_path / "t", [mistake], keeps)
    code, receipt = layers(model, golden, trace, tmp_path / "r.json")
    assert receipt["verdict"] != "parity"
    if (kept, name, where) in NOT_PROVABLE:
        assert code == 3
        return
    assert (code, receipt["verdict"]) == (1, "candidate_defect")
    found = receipt["audit"]["candidate"]["first_guilty"]["tap"]
    assert found in answers(SpecWeights(model.path).config, first_place(mistake), keeps)
    assert receipt["audit"]["reference"]["first_guilty"] is None


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("numerics", [LIKE_BITNET_CPP, Numerics()], ids=["same numerics stated", "none stated"])
def test_greedy_is_not_parity_because_the_tokens_agree(model, golden, tmp_path, name, numerics):
    trace = write(model, golden, tmp_path / "t", [MISTAKES[name]], BY_NAME["logits only"].keeps, numerics=numerics)
    receipt = tmp_path / "r.json"
    steps = len(passes(golden))
    result = run(
        "greedy", "--prompt", PROMPT, "--steps", steps, "--model", model.path, "--candidate", trace,
        "--reference", golden, "--receipt", receipt,
    )  # fmt: skip
    assert "Traceback" not in result.output
    verdict = json.loads(receipt.read_text())["verdict"]
    assert result.exit_code != 0, result.output
    assert verdict != "parity"
    if numerics == LIKE_BITNET_CPP:
        assert result.exit_code == 1, result.output  # the same arithmetic gives the same bits
    gate = run("gate", receipt, "--min-exact-match", "1")
    assert gate.exit_code == 1, gate.output
