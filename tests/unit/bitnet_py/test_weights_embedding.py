"""The tensors of the embedding models: which there must be, which may lack together, which are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.weights import INPUT_NORMS, Weights
from tests.conftest import MakeModel
from tests.support.gguf_bytes import Container, Tensor, model_container

SHAPE = {"dim": 128, "n_heads": 3, "n_kv_heads": 1, "head_dim": 128, "hidden_dim": 256, "vocab_size": 512}
WIDTHS = {"attn_output_norm_in": 128, "ffn_down_norm_in": 256}


def vector(name: str, width: int, value: float = 1.0) -> Tensor:
    return Tensor(f"{name}.weight", (width,), 0, struct.pack(f"<{width}f", *([value] * width)))


def container(arch: str, *, norm_in: bool = True) -> Container:
    made = model_container(arch=arch).without("blk.0.attn_sub_norm.weight", "blk.0.ffn_sub_norm.weight")
    made.tensors += [vector(f"blk.0.{name}", 64) for name in ("attn_q_norm", "attn_k_norm")]
    if norm_in:
        made.tensors += [vector(f"blk.0.{name}", WIDTHS.get(name, 128)) for name in INPUT_NORMS.values()]
    if arch == "gemma3":
        made.tensors += [vector(f"blk.0.{name}", 128) for name in ("post_attention_norm", "post_ffw_norm")]
    return made


def load(tmp_path: Path, made: Container) -> Weights:
    path = tmp_path / "model.gguf"
    path.write_bytes(made.to_bytes())
    with GGUFFile.open(path) as gguf:
        return Weights.load(gguf)


@pytest.mark.parametrize("norms", ["f16", "f32"])
@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_every_norm_is_the_one_of_its_name(make_model: MakeModel, arch: str, norms: str) -> None:
    with GGUFFile.open(make_model(arch=arch, norms=norms, **SHAPE)) as gguf:
        weights = Weights.load(gguf)
        layer = weights.layers[1]
        names = {
            "attn_norm": 128,
            "ffn_norm": 128,
            "attn_q_norm": 128,
            "attn_k_norm": 128,
            "attn_q_norm_in": 128,
            "attn_k_norm_in": 128,
            "attn_v_norm_in": 128,
            "attn_output_norm_in": 384,
            "ffn_gate_norm_in": 128,
            "ffn_up_norm_in": 128,
            "ffn_down_norm_in": 256,
        }
        fields = {
            "attn_q_norm": "q_norm",
            "attn_k_norm": "k_norm",
            "attn_output_norm_in": "attn_sub_norm",
            "ffn_down_norm_in": "ffn_sub_norm",
            "post_attention_norm": "attn_post_norm",
            "post_ffw_norm": "ffn_post_norm",
        }
        if arch == "gemma3":
            names |= {"post_attention_norm": 128, "post_ffw_norm": 128}
        for name, width in names.items():
            found = getattr(layer, fields.get(name, name))
            stored = gguf.data(f"blk.1.{name}.weight").view("<f2" if norms == "f16" else "<f4")
            assert found.shape == (width,)
            assert found.dtype == "float32"
            assert (found == stored).all(), name
        assert (layer.attn_post_norm is None) == (arch == "qwen3")
        assert (layer.q.rows, layer.q.cols, layer.o.rows, layer.o.cols) == (384, 128, 128, 384)
        assert (layer.k.rows, layer.v.rows) == (128, 128)
        n_tensors = 2 + 2 * (20 if arch == "gemma3" else 18)
        assert len(gguf.tensors) == n_tensors


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_norms_of_inputs_all_or_none(tmp_path: Path, arch: str) -> None:
    layer = load(tmp_path, container(arch)).layers[0]
    assert all(getattr(layer, field) is not None for field in INPUT_NORMS)
    layer = load(tmp_path, container(arch, norm_in=False)).layers[0]
    assert all(getattr(layer, field) is None for field in INPUT_NORMS)
    assert layer.q_norm is not None


@pytest.mark.parametrize("name", INPUT_NORMS.values())
def test_one_missing_is_named(tmp_path: Path, name: str) -> None:
    """bitnet.cpp would run without it, and without ffn_gate_norm_in also ignore two others."""
    made = container("qwen3").without(f"blk.0.{name}.weight")
    with pytest.raises(ModelError, match=f"blk.0.{name}.weight: expected all 7 norms of inputs.*1 of 7 missing"):
        load(tmp_path, made)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen3", "attn_q_norm"),
        ("qwen3", "attn_k_norm"),
        ("gemma3", "attn_k_norm"),
        ("gemma3", "post_attention_norm"),
        ("gemma3", "post_ffw_norm"),
    ],
)
def test_what_a_model_must_have(tmp_path: Path, arch: str, name: str) -> None:
    with pytest.raises(ModelError, match=f"blk.0.{name}.weight: .*no such tensor"):
        load(tmp_path, container(arch).without(f"blk.0.{name}.weight"))


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen3", "blk.0.attn_q.scale"),
        ("gemma3", "blk.0.ffn_down.input_scale"),
        ("gemma3", "dense_2.weight"),
        ("qwen3", "cls.weight"),
        ("qwen3", "cls.output.weight"),
        ("qwen3", "blk.0.attn_q.bias"),
        ("qwen3", "rope_freqs.weight"),
        ("qwen3", "blk.0.post_ffw_norm.weight"),
        ("qwen3", "blk.0.attn_sub_norm.weight"),
    ],
)
def test_tensors_that_bitnet_cpp_would_ignore_or_apply_elsewhere(tmp_path: Path, arch: str, name: str) -> None:
    made = container(arch)
    made.tensors.append(Tensor(name, (1,), 0, struct.pack("<f", 1.0)))
    with pytest.raises(ModelError, match=f"unsupported tensor '{name}'"):
        load(tmp_path, made)
