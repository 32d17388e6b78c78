"""The PyTorch model in the ``gpu/`` folder of the user's checkout of bitnet.cpp, recorded by the map for it.

xformers and the CUDA library are stood in for on the CPU (``tests/support/gpu_folder.py``); nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossval
from bitnet_py.gguf import GGUFFile
from bitnet_py.synth import SynthConfig, write_model
from bitnet_py.tokenizer import Tokenizer
from crossval.bitnet_cpp.remedies import SOURCE_VARIABLE
from crossval.traces.read import TraceInfo
from tests.support.torch_models import need

need("torch")
CHECKOUT = os.environ.get(SOURCE_VARIABLE)
if not CHECKOUT:
    missing = f"the PyTorch model of bitnet.cpp is missing: set {SOURCE_VARIABLE}=<checkout of bitnet.cpp>"
    pytest.skip(missing, allow_module_level=True)

import torch  # noqa: E402

from crossval.torch import record  # noqa: E402
from tests.support.gpu_folder import Split, both_models, stood_in  # noqa: E402

pytestmark = pytest.mark.live

PROMPT = "abc abc"
Q, KV, HIDDEN = 256, 64, 512
LAYER = 1
HEADS = (Q // KV, KV)
HIDDEN_TAPS = ("q_rope", "k_rope", "kq", "kq_soft_max", "ffn_act")
"""What no module of the model computes."""
EPS_OF_SUB_NORMS = 1e-6
"""xformers' default: ``RMSNorm(dim, norm_eps)`` of the folder gives its eps to ``include_weight``."""


@pytest.fixture(scope="module", params=[EPS_OF_SUB_NORMS], ids=["eps 1e-6"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    shape = {"n_layers": 3, "dim": Q, "n_heads": 4, "n_kv_heads": 1, "hidden_dim": HIDDEN}
    write_model(path, SynthConfig(**shape, rms_eps=request.param))
    return path


def one_scale_a_matrix(rows: int) -> list[int]:
    return {Q + 2 * KV: [Q, KV, KV], 2 * HIDDEN: [HIDDEN, HIDDEN]}.get(rows, [rows])


def equal_parts(rows: int) -> list[int]:
    """Rows per scale as the kernel has them: all rows / ``ws_num``, which is 3 for q, k and v of 2B-4T."""
    n = {Q + 2 * KV: 3, 2 * HIDDEN: 2}.get(rows, 1)
    return [rows // n] * n


def judged(
    path: Path,
    out: Path,
    dtype: str = "f32",
    *,
    kernel: bool = False,
    split: Split = one_scale_a_matrix,
    fault: Callable[[Any], None] | None = None,
) -> tuple[TraceInfo, dict[str, Any]]:
    """Return the trace of a prompt and two decoded tokens, and what comes of comparing it with the definition."""
    with GGUFFile.open(path) as gguf:
        token_ids = Tokenizer.from_gguf(gguf).encode(PROMPT)
    with stood_in(split):
        format_ = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        model, forward = both_models(Path(CHECKOUT) / "gpu", path, format_, kernel=kernel)
        for one in model.values() if fault else ():
            fault(one)
        info = record(model, token_ids, path, out, tap_map="bitnet-gpu", forward=forward, steps=2)
    return info, dict(crossval.compare_engines(PROMPT, path, candidate=str(out), reference="spec"))


@pytest.mark.parametrize(
    ("dtype", "kernel", "verdict"),
    [("f32", False, "parity"), ("bf16", False, "agrees_within"), ("bf16", True, "agrees_within")],
)
def test_every_module_is_a_tap_and_every_operation_is_within_its_bounds(
    model_file: Path, tmp_path: Path, dtype: str, kernel: bool, verdict: str
) -> None:
    info, receipt = judged(model_file, tmp_path / "trace", dtype, kernel=kernel)
    assert info.engine.numerics.compute_dtype == dtype
    linears = "BitLinear, BitLinearKernel, Linear" if kernel else "BitLinear, Linear"
    assert info.engine.settings["linear_classes"] == linears
    assert [one.plan.kind for one in info.passes] == ["prefill", "decode", "decode"]
    audit = receipt["audit"]["candidate"]
    defined = {row["tap"] for row in receipt["audit"]["reference"]["rows"]}
    for one in info.passes:
        assert set(one.taps) == {tap for tap in defined if tap.rpartition(".")[2] not in HIDDEN_TAPS}
    assert receipt["verdict"] == verdict, audit["first_guilty"]
    assert audit["n_ops"] == audit["n_covered"]
    assert {row["tap"].rpartition(".")[2] for row in audit["rows"] if row["n_segments"]} == {"kqv_out", "ffn_out"}


def _norm_skipped(model: Any) -> None:
    model.layers[LAYER].feed_forward.ffn_sub_norm = torch.nn.Identity()


def _heads_in_halves(model: Any) -> None:
    rows = model.layers[LAYER].attention.wqkv.weight[:Q]
    rows.copy_(rows.unflatten(0, (HEADS[0], KV // 2, 2)).transpose(1, 2).flatten(0, 2))


def _heads_reversed(model: Any) -> None:
    rows = model.layers[LAYER].attention.wqkv.weight[:Q]
    rows.copy_(rows.unflatten(0, HEADS).flip(0).flatten(0, 1))


def _gate_and_up_swapped(model: Any) -> None:
    rows = model.layers[LAYER].feed_forward.w13.weight
    rows.copy_(rows.roll(HIDDEN, 0))


@pytest.mark.parametrize(
    ("dtype", "fault", "op", "name"),
    [
        ("f32", _norm_skipped, "ffn_sub_norm", "norm skipped"),
        ("f32", _heads_in_halves, "q", "output rows in groups of 64: transposed as 32 x 2"),
        ("bf16", _heads_reversed, "q", "undetermined"),
        ("bf16", _gate_and_up_swapped, "ffn_gate", f"weights of blk.{LAYER}.ffn_up.weight"),
    ],
)
def test_a_fault_is_found_in_its_layer_and_operation(
    model_file: Path, tmp_path: Path, dtype: str, fault: Any, op: str, name: str
) -> None:
    _, receipt = judged(model_file, tmp_path / "trace", dtype, fault=fault)
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == f"blk.{LAYER}.{op}"
    assert receipt["diagnosis"][0]["name"] == name


@pytest.mark.parametrize("model_file", [1e-5], ids=["eps 1e-5"], indirect=True)
def test_its_sub_norms_have_an_eps_that_is_not_the_model_s(model_file: Path, tmp_path: Path) -> None:
    _, receipt = judged(model_file, tmp_path / "trace")
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == "blk.0.attn_sub_norm"
    assert receipt["diagnosis"][0]["name"] == f"eps {EPS_OF_SUB_NORMS:g}"


def test_scales_given_to_equal_parts_of_qkv_are_wrong_in_decoding(model_file: Path, tmp_path: Path) -> None:
    _, receipt = judged(model_file, tmp_path / "trace", "bf16", kernel=True, split=equal_parts)
    guilty = receipt["audit"]["candidate"]["first_guilty"]
    assert (receipt["verdict"], guilty["tap"]) == ("candidate_defect", "blk.0.q")
    assert guilty["pass_index"] == 1  # the first token that is decoded
