"""Tensors stored in 16 bits: read exactly, written only where nothing is lost, checked like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from crossval.errors import BadInputError
from crossval.formats import FORMATS, Dtype
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray
from crossval.traces import dtypes
from crossval.traces.read import Trace, TraceModel
from crossval.traces.write import TraceWriter

MODEL = TraceModel("0" * 64, 1, 2, 1, 4, 8, 16, 32)
VALUES = np.array([[1.5, -0.0, 2.0**-130, 1e30, np.nan, np.inf, 3.14159, -7.0]], np.float32)


def written(folder: Path, dtype: Dtype, values: np.ndarray = VALUES, numerics: Numerics | None = None) -> Path:
    array = FORMATS[dtype].round(values).astype(np.float32)
    with TraceWriter(folder, MODEL) as writer:
        writer.add_pass(PassRecord(PassPlan("prefill", (1,), 0), {"inp_embd": TapArray(array, None, dtype)}))
        writer.finish(engine=EngineIdentity("x", numerics=numerics or Numerics()), prompt_ids=[1])
    return folder


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_tensor_is_stored_in_its_format_and_read_to_the_last_bit(tmp_path, dtype):
    trace = Trace.open(written(tmp_path / "t", dtype))
    trace.verify()
    tap = trace.taps(0)["inp_embd"]
    assert (tap.dtype, tap.array.dtype) == (dtype, np.float32)
    expected = FORMATS[dtype].round(VALUES).astype(np.float32)
    finite = np.isfinite(expected)
    assert tap.array[finite].tobytes() == expected[finite].tobytes()
    np.testing.assert_array_equal(tap.array, expected)
    entry = json.loads((tmp_path / "t" / "trace.json").read_text())["passes"][0]["taps"][0]
    assert entry["dtype"] == {"f32": "F32", "f16": "F16", "bf16": "BF16"}[dtype]


def test_every_bit_pattern_survives():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for dtype in ("bf16", "f16"):
        wide = dtypes.widened(bits if dtype == "bf16" else bits.view(np.float16), dtype)
        again = dtypes.widened(dtypes.stored(wide, dtype), dtype)
        np.testing.assert_array_equal(wide, again)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_what_would_be_lost_is_not_stored(tmp_path, dtype):
    array = np.full((1, 8), 1 + 2.0**-20, np.float32)
    record = PassRecord(PassPlan("prefill", (1,), 0), {"inp_embd": TapArray(array, None, dtype)})
    with TraceWriter(tmp_path / "t", MODEL) as writer, pytest.raises(BadInputError, match="store it as F32"):
        writer.add_pass(record)


@pytest.mark.parametrize(("said", "found"), [("F32", "BF16"), ("F16", "BF16")])
def test_a_format_that_the_file_contradicts_is_refused(tmp_path, said, found):
    folder = written(tmp_path / "t", "bf16")
    path = folder / "trace.json"
    path.write_text(path.read_text().replace('"dtype": "BF16"', f'"dtype": "{said}"'))
    with pytest.raises(BadInputError, match=f"is {found} .* trace.json says {said}"):
        Trace.open(folder).verify()


NUMERICS = Numerics(
    compute_dtype="f32",
    op_dtypes=(("attn_norm", "f32"), ("bitlinear", "bf16")),
    activation_quantization="none",
    weights="bf16",
    accumulate="f32",
)


def test_statements_survive_a_trace(tmp_path):
    trace = Trace.open(written(tmp_path / "t", "f32", numerics=NUMERICS))
    assert trace.info.engine.numerics == NUMERICS
    stated = json.loads((tmp_path / "t" / "trace.json").read_text())["engine"]["numerics"]
    assert stated["compute_dtype"] == {"default": "f32", "ops": {"attn_norm": "f32", "bitlinear": "bf16"}}
    assert NUMERICS.formats == {"f32", "bf16"}


@pytest.mark.parametrize(
    ("numerics", "problem"),
    [
        ({"compute_dtype": {"default": "f32", "ops": {"atn_norm": "bf16"}}}, "no operation 'atn_norm'"),
        ({"compute_dtype": {"default": "f32", "ops": {"q": "fp8"}}}, "compute_dtype"),
        ({"compute_dtype": {"ops": {"q": "bf16"}}}, "compute_dtype"),
        ({"activation_quantization": "int4"}, "activation_quantization"),
        ({"weights": "int8"}, "weights"),
        ({"quantizer_block": 256, "activation_quantization": "none"}, "contradicts"),
    ],
)
def test_a_statement_that_means_nothing_is_refused(tmp_path, numerics, problem):
    folder = written(tmp_path / "t", "f32")
    path = folder / "trace.json"
    data = json.loads(path.read_text())
    data["engine"]["numerics"] = numerics
    path.write_text(json.dumps(data))
    with pytest.raises(BadInputError, match=problem):
        Trace.open(folder)


def test_what_older_versions_wrote_of_blocks_is_read():
    found = Numerics.from_json({"simd_width": 8, "fused_quantizer": True, "quantizer_block": 256})
    assert (found.activation_quantization, found.quantizer_block) == ("q8_k", 256)
    assert Numerics.from_json(found.to_json()) == found
    assert Numerics.from_json({"quantizer_block": None}).quantizer_block is None
