"""Embedding and LM head of every type in a file: read, checked, run; what is refused, and how that is said."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from bitnet_py import tables
from bitnet_py.arithmetic import Arithmetic
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from bitnet_py.model import Model
from bitnet_py.tables import TABLE_TYPES, TABLES
from bitnet_py.weights import Weights
from tests.support import tables as emulated
from tests.support.families import FAMILIES

each_type = pytest.mark.parametrize("name", TABLES)
SHAPE = {"n_layers": 1, "dim": 256, "hidden_dim": 256, "vocab_size": 300}
IDS = [3, 290, 3, 17]


def load(path: Path) -> Weights:
    with GGUFFile.open(path) as file:
        return Weights.load(file)


def table_of(path: Path, name: str = "token_embd.weight") -> np.ndarray:
    """Return a table's values by the ``gguf`` package, float32."""
    with GGUFFile.open(path) as file:
        data, info = file.data(name).copy(), file.tensors[name]
    plain = {GGMLType.F16: "<f2", GGMLType.F32: "<f4"}.get(info.type)
    if plain is not None:
        return data.view(plain).reshape(info.shape).astype(np.float32)
    return gguf.dequantize(data.reshape(info.shape[0], -1), gguf.GGMLQuantizationType(int(info.type)))


@each_type
def test_a_pass_reads_and_multiplies_the_table(make_model, name):
    path, kind = make_model(**SHAPE, embedding=name), TABLES[name]
    table = table_of(path)
    with Model.from_gguf(path, n_threads=2) as model:
        last = model.forward(IDS, model.new_cache(), taps=["inp_embd", "result_norm"])
        every = model.forward(IDS, model.new_cache(), taps=["result_norm"], logits="all")
        counted = {one.operation: one.bytes for one in model.counters() if one.operation.startswith("head_")}
        assert model.weights.head_type is kind
        stored = model.weights.head
    np.testing.assert_array_equal(last.taps["inp_embd"], table[IDS])
    assert counted[f"head_{name}"] == 2 * stored.nbytes
    if kind is not GGMLType.F16:
        rows = stored.view(np.uint8)
        for found, tiled in ((last, False), (every, True)):
            expected = emulated.multiply(
                rows, kind, found.taps["result_norm"], main=False, width=8, pairs=False, tiled=tiled
            )
            np.testing.assert_array_equal(found.logits.view(np.uint32), expected.view(np.uint32))


@each_type
def test_families_threads_and_single_tokens_agree(make_model, name):
    path = make_model(**SHAPE, embedding=name)
    found = []
    for kernel in FAMILIES:
        for n_threads in (1, 3):
            with Model.from_gguf(path, n_threads=n_threads, kernel=kernel, bytes_per_thread=1) as model:
                cache = model.new_cache()
                model.forward(IDS, cache, logits="none")
                found.append(model.forward([5], cache).logits.tobytes())
    assert len(set(found)) == 1


def test_a_separate_head_of_another_type(make_model):
    path = make_model(**SHAPE, embedding="f32", head="q6_k")
    weights = load(path)
    assert (weights.token_embd_type, weights.head_type) == (GGMLType.F32, GGMLType.Q6_K)
    with Model.from_gguf(path, n_threads=1) as model:
        found = model.forward(IDS, model.new_cache(), taps=["inp_embd", "result_norm"])
    np.testing.assert_array_equal(found.taps["inp_embd"], table_of(path)[IDS])
    near = found.taps["result_norm"].astype(np.float64) @ table_of(path, "output.weight").T.astype(np.float64)
    np.testing.assert_allclose(found.logits, near, atol=0.05 * np.abs(near).max())


def test_the_largest_logits_of_a_head_that_is_not_screened(make_model):
    path = make_model(**SHAPE, embedding="q8_0")
    with Model.from_gguf(path, n_threads=1, screen_from_bytes=1) as model:
        assert not model.searches_head
        cache = model.new_cache()
        model.largest([1], cache, 3)
        best = model.largest([2], cache, 3)
        again = model.new_cache()
        expected = model.forward([1, 2], again).logits
    assert list(best.ids) == list(np.argsort(-expected[-1], kind="stable")[:3])


@pytest.mark.parametrize(("arch", "vocab_size", "packed"), [("llama", 304, True), ("llama", 300, False),
                                                            ("bitnet", 304, False)])  # fmt: skip
def test_main_packs_a_head_of_its_own(make_model, arch, vocab_size, packed):
    shape = {**SHAPE, "vocab_size": vocab_size, "arch": arch, "sub_norms": arch != "llama"}
    path = make_model(**shape, embedding="q4_0")
    with Model.from_gguf(path, n_threads=1, arithmetic=Arithmetic("main")) as model:
        found = model.forward(IDS, model.new_cache(), taps=["result_norm"], logits="all")
        rows = model.weights.head
    options = {"main": True, "width": 8, "pairs": False, "tiled": True}
    of_norm = found.taps["result_norm"]
    expected = [emulated.multiply(rows, GGMLType.Q4_0, of_norm, packed=p, **options) for p in (packed, not packed)]
    np.testing.assert_array_equal(found.logits.view(np.uint32), expected[0].view(np.uint32))
    assert not np.array_equal(*expected)


D_AT = {"q8_0": 0, "q4_0": 0, "q5_0": 0, "q6_k": 208, "q3_k": 108, "tq1_0": 52, "tq2_0": 64}


@each_type
def test_values_that_are_not_finite_are_found(make_model, tmp_path, name):
    source, kind = make_model(**SHAPE, embedding=name), TABLES[name]
    data, row = bytearray(source.read_bytes()), 7
    with GGUFFile.open(source) as file:
        offset = file.tensors["token_embd.weight"].offset
        row_bytes = file.tensors["token_embd.weight"].size_bytes // 300
    at = offset + row * row_bytes + D_AT.get(name, 0)
    nan = {GGMLType.F32: struct.pack("<f", np.nan), GGMLType.BF16: b"\xc0\x7f"}.get(
        kind, struct.pack("<e", np.inf)
    )
    data[at : at + len(nan)] = nan
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=re.escape("token_embd.weight, element (7, 0): expected a finite value")):
        load(path).check_finite()
    load(source).check_finite()


def test_code_3_of_tq2_0_is_found():
    rows = emulated.random_rows(GGMLType.TQ2_0, 2, 512).copy()
    assert tables.find_unusable(rows, GGMLType.TQ2_0) is None
    rows[1, 66 + 5] |= 3
    assert tables.find_unusable(rows, GGMLType.TQ2_0) == (1, 256, "code 3")


@pytest.mark.parametrize("name", ["q6_k", "q3_k", "tq1_0", "tq2_0"])
def test_rows_that_are_no_whole_blocks_are_refused(make_model, name):
    with pytest.raises(ModelError, match=f"dim to be a multiple of 256 for {name}, found 128"):
        make_model(embedding=name)


def test_the_types_of_the_c_library_are_in_order():
    """Each type's values, by the number that the library is given, are those of the package."""
    for kind in TABLE_TYPES:
        row = emulated.random_rows(kind, 1, 256, seed=5)[0]
        if kind in emulated.IN_BLOCKS:
            expected = gguf.dequantize(row[None], gguf.GGMLQuantizationType(int(kind)))[0]
            np.testing.assert_array_equal(tables.values(row, kind), expected)


# --- norms and projections ------------------------------------------------------------------------------------


def test_norms_of_f16(make_model):
    half, full = (load(make_model(**SHAPE, norms=kind)) for kind in ("f16", "f32"))
    for name in ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"):
        stored = getattr(half.layers[0], name)
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored, getattr(full.layers[0], name).astype(np.float16))


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_ternary_matrices_in_floating_point(make_model, kind):
    floats, packed = (load(make_model(**SHAPE, projections=one)) for one in (kind, "i2_s"))
    for one, other in zip(floats.matrices(), packed.matrices(), strict=True):
        np.testing.assert_array_equal(one.data, other.data)
        assert one.scale == (other.scale if kind == "f32" else np.float16(other.scale))


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.01234, "element (2, 3): expected 0 or"), (np.nan, "expected finite weights"), (np.inf, "finite weights")],
)
def test_matrices_that_are_not_ternary_are_refused(make_model, tmp_path, value, message):
    source = make_model(**SHAPE, projections="f32")
    data = bytearray(source.read_bytes())
    with GGUFFile.open(source) as file:
        offset = file.tensors["blk.0.ffn_up.weight"].offset
    struct.pack_into("<f", data, offset + 4 * (2 * 256 + 3), value)
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"tensor blk\.0\.ffn_up\.weight: .*" + re.escape(message)) as error:
        load(path)
    assert "convert or download it again" in str(error.value)


def test_an_ordinary_quantised_model_is_refused_by_type(make_model, tmp_path):
    source = make_model(**SHAPE, projections="f16")
    data = source.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    path = tmp_path / "q4_k.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", GGMLType.Q4_K) + data[at + 4 :])
    with pytest.raises(ModelError, match=r"expected type I2_S or TQ1_0 .*, found Q4_K; no 1\.58-bit model"):
        load(path)
