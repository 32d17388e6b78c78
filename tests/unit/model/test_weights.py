"""The specification's weights against a file written byte by byte, and its rejection of unsupported files."""

import struct

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_py.convert import convert
from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from bitnet_py.quants import unpack_i2_s
from bitnet_py.weights import Weights
from crossval.errors import BadInputError
from crossval.model import weights as spec_weights
from crossval.model.graphs import op_table
from crossval.model.kinds import Silu, SquaredRelu, TernaryMatrix
from crossval.model.ternary import decode_blocks, decode_i2_s
from crossval.model.weights import SpareWeights, SpecWeights
from tests.support.tiny_gguf import (
    ARCH,
    ARRAY,
    F16,
    F32,
    FLOAT32,
    I2_S,
    STRING,
    UINT32,
    i2_s_bytes,
    tiny_model,
    write_gguf,
)

SHAPE = {"dim": 256, "hidden_dim": 512, "arch": "bitnet"}


@pytest.fixture
def model(tmp_path):
    metadata, tensors, signs = tiny_model()
    return write_gguf(tmp_path / "m.gguf", metadata, tensors), tensors, signs


class TestDecode:
    @given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
    @settings(max_examples=25, deadline=None)
    def test_undoes_an_elementwise_packer(self, rows, blocks, seed):
        signs = np.random.default_rng(seed).integers(-1, 2, (rows, 128 * blocks))
        packed = np.frombuffer(i2_s_bytes(signs, 1.0)[:-32], np.uint8)
        decoded = decode_i2_s(packed, rows, 128 * blocks)
        assert decoded.dtype == np.float32
        assert np.array_equal(decoded, signs)

    def test_the_worked_example(self):
        packed = np.full(32, 0b01010101, np.uint8)
        packed[5] = 0b10_01_00_01
        row = decode_i2_s(packed, 1, 128)[0]
        assert row[[5, 37, 69, 101]].tolist() == [1, 0, -1, 0]
        assert np.count_nonzero(row) == 2

    @pytest.mark.parametrize("bad", [0b11_01_01_01, 0b01_11_01_01, 0b01_01_11_01, 0b01_01_01_11])
    def test_code_three_is_refused_wherever_it_stands(self, bad):
        packed = np.full(64, 0b01010101, np.uint8)
        packed[40] = bad
        with pytest.raises(ValueError, match="found 3"):
            decode_i2_s(packed, 2, 128)

    @pytest.mark.parametrize("byte", [0b10_10_10_10, 0b01_10_01_10, 0b10_01_10_01, 0])
    def test_neighbouring_bits_of_two_codes_are_not_a_three(self, byte):
        decode_i2_s(np.full(32, byte, np.uint8), 1, 128)

    def test_rows_that_are_not_whole_blocks_are_refused(self):
        with pytest.raises(ValueError, match="multiple of 128"):
            decode_i2_s(np.zeros(64, np.uint8), 4, 64)


class TestTensors:
    def test_every_tensor_is_what_was_written(self, model):
        path, tensors, signs = model
        weights = SpecWeights(path)
        for name, (kind, shape, data) in tensors.items():
            weight = weights[name]
            if kind == I2_S:
                assert isinstance(weight, TernaryMatrix)
                assert np.array_equal(weight.signs, signs[name])
                assert weight.scale == struct.unpack("<f", data[-32:-28])[0]
            else:
                dtype = {F32: "<f4", F16: "<f2"}[kind]
                assert np.array_equal(weight, np.frombuffer(data, dtype).reshape(shape))
                assert weight.dtype == (np.float64 if kind == F32 else np.float16)

    def test_unknown_name(self, model):
        with pytest.raises(KeyError):
            SpecWeights(model[0])["blk.9.attn_q.weight"]

    @pytest.mark.parametrize("missing", [0, 1])
    def test_decoded_matrices_are_kept_when_all_fit_into_the_budget(self, model, monkeypatch, missing):
        needed = sum(4 * m.size for m in model[2].values())
        monkeypatch.setattr(spec_weights, "DECODED_BUDGET_BYTES", needed - missing)
        weights = SpecWeights(model[0])
        kept = weights["blk.0.attn_q.weight"] is weights["blk.0.attn_q.weight"]
        assert kept == (missing == 0)

    @pytest.mark.parametrize("budget", [0, 1 << 30])
    def test_memory_that_is_there_is_used_again_unless_matrices_are_kept(self, model, monkeypatch, budget):
        monkeypatch.setattr(spec_weights, "DECODED_BUDGET_BYTES", budget)
        weights = SpecWeights(model[0])
        spare = SpareWeights(weights)
        names = ["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_norm.weight"]
        alone = [np.array(getattr(weights[name], "signs", weights[name])) for name in names]
        weights.reuse([])
        found = [spare[name] for name in names]
        shared = np.shares_memory(found[0].signs, found[1].signs)
        assert shared == (budget == 0)
        np.testing.assert_array_equal(found[1].signs, alone[1])
        np.testing.assert_array_equal(found[0].signs, alone[shared])
        np.testing.assert_array_equal(found[2], alone[2])

    def test_the_reader_takes_a_vocabulary_without_an_object_per_entry(self, tmp_path):
        metadata, tensors, _ = tiny_model(n_layers=1)
        metadata = {"a.strings": (ARRAY, (STRING, ["", "x", "\u00e9" * 300])), **metadata}
        weights = SpecWeights(write_gguf(tmp_path / "m.gguf", metadata, tensors))
        field = weights._reader.fields["tokenizer.ggml.tokens"]
        assert len(field.parts) < 8
        assert weights.config.n_layers == 1


class TestBlockTypes:
    """TQ1_0 and TQ2_0, decoded by the gguf package, against I2_S of the same weights."""

    @pytest.mark.parametrize("projections", ["tq1_0", "tq2_0"])
    def test_same_weights_as_in_i2_s(self, tmp_path, make_model, projections):
        model = make_model(**SHAPE, projections=projections)
        convert(model, tmp_path / "i2_s.gguf", GGMLType.I2_S)
        found, expected = SpecWeights(model), SpecWeights(tmp_path / "i2_s.gguf")
        assert found.config == expected.config
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.1.ffn_up.weight"):
            np.testing.assert_array_equal(found[name].signs, expected[name].signs)
            assert found[name].signs.dtype == np.float32
            assert found[name].scale == expected[name].scale

    def test_the_engine_reads_the_same(self, make_model):
        model = make_model(**SHAPE, projections="tq1_0")
        with GGUFFile.open(model) as gguf:
            spec = SpecWeights(model)
            for matrix in Weights.load(gguf).matrices():
                signs = unpack_i2_s(matrix.data, matrix.rows, matrix.cols)
                np.testing.assert_array_equal(spec[matrix.name].signs, signs)
                assert spec[matrix.name].scale == matrix.scale

    @pytest.mark.parametrize("kind", [GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0])
    @pytest.mark.parametrize(
        ("row", "scale", "message"), [(1, 0.25, "blocks of different scales"), (69, np.nan, "finite scales")]
    )
    def test_what_is_not_one_ternary_matrix_is_refused(self, kind, row, scale, message):
        blocks = quantize(np.ones((70, 512), np.float32) * np.float32(0.5), kind)
        assert decode_blocks(blocks, kind, (70, 512))[1] == 0.5
        blocks[row, -2:] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        with pytest.raises(ValueError, match=message):
            decode_blocks(blocks, kind, (70, 512))

    def test_zeros(self):
        kind = GGMLQuantizationType.TQ2_0
        signs, scale = decode_blocks(quantize(np.zeros((1, 256), np.float32), kind), kind, (1, 256))
        assert scale == 1.0
        assert not signs.any()


class TestConfig:
    @pytest.mark.parametrize("arch", ["bitnet", "bitnet-b1.58", "bitnet-25"])
    def test_the_architecture_implies_the_activation(self, make_model, arch):
        kinds = {op.name: op.kind for op in op_table(SpecWeights(make_model(arch=arch)).config)}
        assert kinds["ffn_act"] == (Silu() if arch == "bitnet" else SquaredRelu())

    def test_every_value_comes_from_the_header(self, model):
        config = SpecWeights(model[0]).config
        assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (2, 2, 1, 64)
        assert (config.dim, config.hidden_dim, config.vocab_size, config.context_length) == (128, 256, 40, 32)
        assert config.rope_base == 500000.0
        assert config.rms_eps == float(np.float32(1e-5))
        assert config.attn_sub_norm
        assert config.ffn_sub_norm
        assert config.tied_head

    def test_defaults_of_optional_keys(self, tmp_path):
        metadata, tensors, _ = tiny_model(n_layers=1)
        del metadata[f"{ARCH}.rope.freq_base"]
        assert SpecWeights(write_gguf(tmp_path / "m.gguf", metadata, tensors)).config.rope_base == 10000.0
        del metadata[
            f"{ARCH}.attention.head_count_kv"
        ]  # as many as query heads, which this file's k is too small for
        with pytest.raises(
            BadInputError, match=r"attn_k\.weight, shape: expected \(128, 128\), found \(64, 128\)"
        ):
            SpecWeights(write_gguf(tmp_path / "n.gguf", metadata, tensors))

    def test_models_without_sub_norms_and_with_their_own_head(self, tmp_path):
        metadata, tensors, _ = tiny_model(sub_norms=False, tied=False)
        config = SpecWeights(write_gguf(tmp_path / "m.gguf", metadata, tensors)).config
        assert not config.attn_sub_norm
        assert not config.ffn_sub_norm
        assert not config.tied_head


class TestRefusals:
    """Each broken file gives one line that names the place."""

    def read_everything(self, path, tensors):
        weights = SpecWeights(path)
        for name in tensors:
            weights[name]

    def refuse(self, tmp_path, metadata, tensors, match):
        path = write_gguf(tmp_path / "bad.gguf", metadata, tensors)
        with pytest.raises(BadInputError, match=match) as error:
            self.read_everything(path, tensors)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("name", "replacement", "match"),
        [
            ("blk.1.attn_q.weight", None, "attn_q.weight: expected shape .*found no such tensor"),
            ("token_embd.weight", None, "token_embd.weight"),
            ("blk.1.ffn_sub_norm.weight", None, "ffn_sub_norm.weight: expected shape"),
            ("rope_freqs.weight", (F32, (32,), bytes(128)), "rope_freqs.weight: expected no such tensor"),
            ("blk.0.attn_q.bias", (F32, (128,), bytes(512)), "attn_q.bias: expected no such tensor"),
            (
                "blk.0.attn_q.weight",
                (8, (128, 128), bytes(128 * 4 * 34)),
                "attn_q.weight, type: expected I2_S or TQ1_0 or TQ2_0 or F16 or F32, found Q8_0",
            ),
            ("output_norm.weight", (30, (128,), bytes(256)), "output_norm.weight, type: .*found BF16"),
            ("output_norm.weight", (F32, (64,), bytes(256)), r"output_norm.weight, shape: expected \(128,\)"),
            ("output_norm.weight", (F32, (128,), b"\0\0\xc0\x7f" * 128), "output_norm.weight: expected finite"),
            ("blk.0.attn_q.weight", (I2_S, (128, 128), b"\xff" * 4096 + b"\0" * 32), "found 3"),
            ("blk.0.attn_q.weight", (I2_S, (128, 128), bytes(4096 + 32)), "attn_q.weight, scale"),
            ("blk.0.attn_q.weight", (I2_S, (128, 128), bytes(4096) + b"\0\0\xc0\x7f" + bytes(28)), "scale.*nan"),
        ],
    )
    def test_tensors(self, tmp_path, name, replacement, match):
        metadata, tensors, _ = tiny_model()
        if replacement is None:
            del tensors[name]
        else:
            tensors[name] = replacement
        self.refuse(tmp_path, metadata, tensors, match)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (f"{ARCH}.block_count", None),
            (f"{ARCH}.attention.head_count", (UINT32, 0)),
            (f"{ARCH}.attention.head_count", (STRING, "two")),
            (f"{ARCH}.attention.layer_norm_rms_epsilon", (FLOAT32, float("nan"))),
            (f"{ARCH}.rope.scaling.type", (STRING, "yarn")),
            ("general.architecture", (STRING, "mamba")),
        ],
    )
    def test_header(self, tmp_path, key, value):
        metadata, tensors, _ = tiny_model(n_layers=1)
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
        self.refuse(tmp_path, metadata, tensors, key.rsplit(".", 1)[-1])

    def test_missing_file(self, tmp_path):
        with pytest.raises(BadInputError, match=r"none\.gguf"):
            SpecWeights(tmp_path / "none.gguf")

    @pytest.mark.parametrize("keep", [0, 3, 20, 200, 0.5, 0.999])
    def test_truncated_file(self, model, keep):
        raw = model[0].read_bytes()
        model[0].write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
        with pytest.raises(BadInputError):
            SpecWeights(model[0])
