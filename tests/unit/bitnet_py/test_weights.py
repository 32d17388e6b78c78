from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitnet_py import weights as weights_module
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.quants import unpack_i2_s
from bitnet_py.weights import Weights
from tests.support.gguf_bytes import Container, Tensor, model_container

Load = Callable[[Container], Weights]
MATRICES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
NORMS = ["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_container(container: Container) -> Weights:
        path = tmp_path / "model.gguf"
        path.write_bytes(container.to_bytes())
        with GGUFFile.open(path) as gguf:
            return Weights.load(gguf)

    return load_container


def patch(tensor: Tensor, start: int, data: bytes) -> None:
    tensor.data = tensor.data[:start] + data + tensor.data[start + len(data) :]


def test_views_are_typed_and_read_only(load: Load) -> None:
    weights = load(model_container())
    layer = weights.layers[0]
    assert weights.token_embd.shape == (4, 128)
    assert weights.token_embd.dtype == np.float16
    assert (weights.token_embd == 0.5).all()
    assert weights.output is None
    assert weights.head is weights.token_embd
    assert (layer.gate.rows, layer.gate.cols, layer.gate.scale) == (256, 128, 0.25)
    assert layer.gate.data.shape == (256 * 128 // 4,)
    assert layer.k.rows == layer.v.rows == 64
    assert layer.ffn_sub_norm is not None
    assert layer.ffn_sub_norm.shape == (256,)
    for view in (weights.token_embd, weights.output_norm, layer.attn_norm, layer.down.data):
        assert not view.flags.owndata
        assert not view.flags.writeable
    weights.check_finite()


@pytest.mark.parametrize("projections", ["tq1_0", "tq2_0"])
def test_matrices_in_blocks_of_256_are_packed_anew(make_model: Callable[..., Path], projections: str) -> None:
    shape = {"dim": 256, "hidden_dim": 512, "arch": "bitnet"}
    with (
        GGUFFile.open(make_model(**shape)) as plain,
        GGUFFile.open(make_model(**shape, projections=projections)) as blocks,
    ):
        for expected, found in zip(Weights.load(plain).matrices(), Weights.load(blocks).matrices(), strict=True):
            np.testing.assert_array_equal(found.data, expected.data)
            assert (found.rows, found.cols) == (expected.rows, expected.cols)
            assert found.scale == float(np.float16(expected.scale))
            assert not found.data.flags.writeable


def test_one_type_for_all_matrices(load: Load) -> None:
    container = model_container()
    tensor = container.tensor("blk.0.ffn_down.weight")
    tensor.type, tensor.data = 35, 128 * (bytes(64) + struct.pack("<e", 0.5))
    with pytest.raises(ModelError, match=r"ffn_down.weight: expected type I2_S, as others have, found TQ2_0"):
        load(container)


def test_blocks_that_are_no_ternary_matrix_give_one_line(load: Load) -> None:
    container = model_container()
    tensor = container.tensor("blk.0.ffn_down.weight")
    blocks = [bytes(64) + struct.pack("<e", scale) for scale in (0.5, 0.5, 0.25)]
    tensor.type, tensor.data = 35, b"".join(blocks) + 125 * blocks[0]
    with pytest.raises(ModelError, match=r"m.*gguf: tensor blk.0.ffn_down.weight: blocks of different") as error:
        load(container)
    assert "\n" not in str(error.value)


def test_every_matrix_is_the_one_of_its_name(load: Load) -> None:
    container = model_container()
    for number, name in enumerate(MATRICES):
        tensor = container.tensor(f"blk.0.{name}.weight")
        patch(tensor, len(tensor.data) - 32, struct.pack("<f", number + 1))
    for number, name in enumerate([*NORMS, "output_norm"]):
        tensor = container.tensor(f"blk.0.{name}.weight" if number < 4 else "output_norm.weight")
        patch(tensor, 0, struct.pack("<f", number + 10))
    weights = load(container)
    layer = weights.layers[0]
    matrices = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    assert [matrix.scale for matrix in matrices] == [1, 2, 3, 4, 5, 6, 7]
    assert [matrix.scale for matrix in weights.matrices()] == [1, 2, 3, 4, 5, 6, 7]
    norms = (layer.attn_norm, layer.attn_sub_norm, layer.ffn_norm, layer.ffn_sub_norm, weights.output_norm)
    assert [norm[0] for norm in norms if norm is not None] == [10, 11, 12, 13, 14]


def test_separate_head_is_exposed(load: Load) -> None:
    container = model_container()
    container.tensors.append(Tensor("output.weight", (4, 128), 1, struct.pack("<512e", *([0.25] * 512))))
    weights = load(container)
    assert weights.output is not None
    assert weights.head is weights.output
    assert (weights.output == 0.25).all()


def test_models_without_sub_norms(load: Load) -> None:
    layer = load(model_container().without("blk.0.attn_sub_norm.weight", "blk.0.ffn_sub_norm.weight")).layers[0]
    assert layer.attn_sub_norm is None
    assert layer.ffn_sub_norm is None


@pytest.mark.parametrize("name", ["attn_sub_norm", "ffn_sub_norm"])
def test_half_of_the_sub_norms_is_an_error(load: Load, name: str) -> None:
    with pytest.raises(ModelError, match=rf"blk.0.{name}.weight: expected both sub-norms.*1 of 2 missing"):
        load(model_container().without(f"blk.0.{name}.weight"))


REQUIRED = [
    "token_embd",
    "output_norm",
    "blk.0.attn_norm",
    "blk.0.ffn_norm",
    *(f"blk.0.{name}" for name in MATRICES),
]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_tensor(load: Load, name: str) -> None:
    with pytest.raises(ModelError, match=rf"tensor {name}.weight: expected .*found no such tensor"):
        load(model_container().without(f"{name}.weight"))


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "blk.0.attn_q.bias",
        "blk.0.ffn_down.bias",
        "blk.1.attn_norm.weight",
        "blk.0.attn_q.scale",
    ],
)
def test_tensors_the_engine_would_ignore_are_refused(load: Load, name: str) -> None:
    container = model_container()
    container.tensors.append(Tensor(name, (8,), 0, bytes(32)))
    with pytest.raises(ModelError, match=f"unsupported tensor '{name}'"):
        load(container)


@pytest.mark.parametrize("name", [*REQUIRED, "blk.0.attn_sub_norm", "blk.0.ffn_sub_norm"])
def test_wrong_type(load: Load, name: str) -> None:
    container = model_container()
    tensor = container.tensor(f"{name}.weight")
    tensor.type, tensor.data = 24, bytes(8192 * 8)  # I8
    with pytest.raises(ModelError, match=rf"tensor {name}.weight: expected type .*found I8"):
        load(container)


@pytest.mark.parametrize("name", [*REQUIRED, "blk.0.attn_sub_norm", "blk.0.ffn_sub_norm"])
def test_wrong_shape(load: Load, name: str) -> None:
    container = model_container()
    tensor = container.tensor(f"{name}.weight")
    tensor.shape = (*tensor.shape[:-1], tensor.shape[-1] // 2)
    with pytest.raises(ModelError, match=rf"tensor {name}.weight: expected shape .*found"):
        load(container)


def test_transposed_matrix_is_a_wrong_shape(load: Load) -> None:
    container = model_container()
    container.tensor("blk.0.ffn_down.weight").shape = (256, 128)
    with pytest.raises(ModelError, match=r"expected shape \(128, 256\), found \(256, 128\)"):
        load(container)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -1.0])
def test_unusable_scale(load: Load, value: float) -> None:
    container = model_container()
    tensor = container.tensor("blk.0.ffn_up.weight")
    patch(tensor, len(tensor.data) - 32, struct.pack("<f", value))
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight, scale: expected a finite value above 0"):
        load(container)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*(f"blk.0.{name}" for name in NORMS), "output_norm"])
def test_norm_that_is_not_finite(load: Load, name: str, value: float) -> None:
    container = model_container()
    patch(container.tensor(f"{name}.weight"), 4 * 77, struct.pack("<f", value))
    with pytest.raises(ModelError, match=rf"{name}.weight, element 77: expected a finite value, found {value}"):
        load(container)


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 16 << 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finds_the_bad_embedding_value(
    load: Load, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, value: float
) -> None:
    monkeypatch.setattr(weights_module, "_CHUNK_BYTES", chunk_bytes)
    container = model_container()
    container.tensors.append(Tensor("output.weight", (4, 128), 1, container.tensor("token_embd.weight").data))
    patch(container.tensor("output.weight"), 2 * (2 * 128 + 5), struct.pack("<e", value))
    weights = load(container)
    with pytest.raises(ModelError, match=rf"tensor output.weight, element \(2, 5\): .*found {value}"):
        weights.check_finite()


def test_largest_finite_f16_is_fine(load: Load) -> None:
    container = model_container()
    patch(container.tensor("token_embd.weight"), 10, struct.pack("<2e", 65504.0, -65504.0))
    load(container).check_finite()


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 16 << 20])
@pytest.mark.parametrize("name", MATRICES)
def test_check_finds_code_3(load: Load, monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int) -> None:
    monkeypatch.setattr(weights_module, "_CHUNK_BYTES", chunk_bytes)
    container = model_container()
    patch(container.tensor(f"blk.0.{name}.weight"), 1500, b"\x30")
    weights = load(container)
    cols = 256 if name == "ffn_down" else 128
    with pytest.raises(ModelError, match=rf"blk.0.{name}.weight, byte 1500 \(row {6000 // cols}\): .*code 3"):
        weights.check_finite()


def test_shipped_model_is_sound(shipped_model: Path) -> None:
    with GGUFFile.open(shipped_model) as gguf:
        weights = Weights.load(gguf)
    weights.check_finite()
    matrix = weights.layers[-1].down
    ternary = unpack_i2_s(matrix.data, matrix.rows, matrix.cols)
    assert ternary.shape == (weights.config.dim, weights.config.hidden_dim)
    assert set(np.unique(ternary)) == {-1, 0, 1}


class TestLlama:
    """What only files of llama, or of bitnet, may have."""

    @pytest.fixture
    def llama(self) -> Container:
        return model_container(arch="llama").without(
            *(f"blk.0.{name}_sub_norm.weight" for name in ("attn", "ffn"))
        )

    @staticmethod
    def add(container: Container, name: str, *values: float, kind: int = 0) -> Container:
        form = f"<{len(values)}{'f' if kind == 0 else 'e'}"
        container.tensors.append(Tensor(name, (len(values),), kind, struct.pack(form, *values)))
        return container

    def test_everything_optional(self, load: Load, llama: Container) -> None:
        self.add(llama, "blk.0.attn_k.bias", *range(64))
        self.add(llama, "blk.0.ffn_down.scale", 0.75)
        self.add(llama, "rope_freqs.weight", *range(1, 33))
        weights = load(llama)
        layer = weights.layers[0]
        assert layer.attn_sub_norm is None
        assert layer.k.bias is not None
        assert layer.k.bias.tolist() == list(range(64))
        assert (layer.q.bias, layer.q.factor, layer.down.factor) == (None, 1.0, 0.75)
        assert weights.rope_factors is not None
        assert weights.rope_factors.tolist() == list(range(1, 33))

    def test_scales_belong_to_bitnet_too(self, load: Load) -> None:
        weights = load(self.add(model_container(arch="bitnet"), "blk.0.attn_q.scale", 1.5))
        assert weights.layers[0].q.factor == 1.5

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("blk.0.attn_q.bias", [0.0] * 127, r"attn_q.bias: expected shape \(128,\)"),
            ("blk.0.attn_q.bias", [float("nan")] * 128, "attn_q.bias, element 0: expected a finite value"),
            ("blk.0.attn_q.scale", [0.0], "attn_q.scale, element 0: expected a value above 0"),
            ("blk.0.attn_q.scale", [1.0, 1.0], r"attn_q.scale: expected shape \(1,\)"),
            ("rope_freqs.weight", [1.0] * 31 + [0.0], "rope_freqs.weight, element 31: expected a value above 0"),
            ("rope_freqs.weight", [1.0] * 64, r"rope_freqs.weight: expected shape \(32,\)"),
            ("blk.0.ffn_up.bias", [0.0] * 256, "unsupported tensor 'blk.0.ffn_up.bias'"),
            ("blk.0.attn_sub_norm.weight", [1.0] * 128, "unsupported tensor 'blk.0.attn_sub_norm.weight'"),
            ("output.scale", [1.0], "unsupported tensor 'output.scale'"),
        ],
    )
    def test_unusable(self, load: Load, llama: Container, name: str, values: list[float], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load(self.add(llama, name, *values))

    def test_a_bias_of_another_type(self, load: Load, llama: Container) -> None:
        with pytest.raises(ModelError, match=r"attn_v.bias: expected type F32.*convert the model again"):
            load(self.add(llama, "blk.0.attn_v.bias", *[0.5] * 64, kind=1))

    def test_a_bias_in_one_of_two_layers(self, load: Load, llama: Container) -> None:
        second = [
            Tensor(t.name.replace("blk.0", "blk.1"), t.shape, t.type, t.data)
            for t in llama.tensors
            if t.name.startswith("blk.")
        ]
        both = llama.with_key("llama.block_count", 4, 2)
        both.tensors.extend(second)
        self.add(both, "blk.1.attn_output.bias", *[0.5] * 128)
        with pytest.raises(
            ModelError, match=r"blk.0.attn_output.bias: expected a bias in every layer, or in none"
        ):
            load(both)
