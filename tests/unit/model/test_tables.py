"""The specification's tables: the package's values, whatever their size; what no table holds is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from bitnet_py.ggml_types import GGMLType
from crossval.errors import BadInputError
from crossval.model import tables
from crossval.model.ternary import decode_floats
from crossval.model.weights import SpecWeights
from tests.support import tables as emulated

SHAPE = {"n_layers": 1, "dim": 256, "hidden_dim": 256, "vocab_size": 300}
DECODED = [name for name in tables.TABLE_TYPES if name not in ("F16", "F32")]


@pytest.mark.parametrize("name", tables.TABLE_TYPES)
def test_a_model_with_a_table_of_each_type(make_model, name):
    weights = SpecWeights(make_model(**SHAPE, embedding=name.lower()))
    assert (weights.config.head_type, weights.config.tied_head) == (name, True)
    table = weights["token_embd.weight"]
    assert table.shape == (weights.config.vocab_size, 256) == (300, 256)
    assert 1.0 < np.std(np.asarray(table, np.float64)) * 16 < 8.0
    assert weights["token_embd.weight"] is table


def test_a_separate_head_of_another_type(make_model):
    weights = SpecWeights(make_model(**SHAPE, embedding="f32", head="q6_k"))
    assert (weights.config.head_type, weights.config.tied_head) == ("Q6_K", False)
    assert not np.array_equal(weights["output.weight"], weights["token_embd.weight"])


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("most", [0, 1 << 30])
def test_values_in_memory_and_in_a_file(monkeypatch, name, most):
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", most)
    kind = GGMLQuantizationType[name]
    rows = emulated.random_rows(GGMLType[name], 300, 256)
    found = tables.decode(rows, kind)
    np.testing.assert_array_equal(found, gguf.dequantize(rows, kind))
    assert not found.flags.writeable
    assert type(found @ np.ones((256, 1))) is np.ndarray


@pytest.mark.parametrize("name", ["Q6_K", "TQ1_0", "TQ2_0"])
def test_the_norm_of_a_row_s_steps(name):
    rows = emulated.random_rows(GGMLType[name], 4, 512)
    d, scales, _ = emulated.decode(rows, GGMLType[name])
    steps = d[..., None].astype(np.float64) * scales
    found = tables.decode(rows, GGMLQuantizationType[name]).steps
    np.testing.assert_allclose(found, np.sqrt((steps**2).sum(axis=(1, 2))), rtol=1e-6)


def test_what_is_not_finite_is_refused(make_model, tmp_path):
    source = make_model(**SHAPE, embedding="q8_0").read_bytes()
    table = SpecWeights(make_model(**SHAPE, embedding="q8_0"))._reader.tables["token_embd.weight"][1]
    at = source.index(table[0].tobytes())
    path = tmp_path / "bad.gguf"
    path.write_bytes(source[:at] + b"\x00\x7c" + source[at + 2 :])
    with pytest.raises(BadInputError, match=r"token_embd\.weight: expected Q8_0 weights, found .*rows 0 to 255"):
        SpecWeights(path)["token_embd.weight"]


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_ternary_matrices_in_floating_point(make_model, kind):
    floats, packed = (SpecWeights(make_model(**SHAPE, projections=one)) for one in (kind, "i2_s"))
    one, other = floats["blk.0.ffn_down.weight"], packed["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(one.signs, other.signs)
    assert one.scale == (np.float16(other.scale) if kind == "f16" else other.scale)


def test_norms_of_f16(make_model):
    half, full = (SpecWeights(make_model(**SHAPE, norms=one)) for one in ("f16", "f32"))
    np.testing.assert_array_equal(half["output_norm.weight"], full["output_norm.weight"].astype(np.float16))


def test_numbers_of_more_than_one_size_are_refused():
    with pytest.raises(ValueError, match="one scale, found other values"):
        decode_floats(np.array([[0.5, -0.5], [0.0, 0.25]], np.float32))
    with pytest.raises(ValueError, match="finite"):
        decode_floats(np.array([[0.5, np.nan]], np.float32))
    signs, scale = decode_floats(np.zeros((2, 2), np.float16))
    assert not signs.any()
    assert scale == 1.0
