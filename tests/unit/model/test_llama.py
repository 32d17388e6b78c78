"""The llama graph against the model in loops, on files that the ``gguf`` package reads by itself."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from bitnet_py.quants import unpack_i2_s
from crossval.errors import BadInputError
from crossval.model.graphs import op_table
from crossval.model.kinds import rope, rope_frequencies
from crossval.model.op import KVState, forward
from crossval.model.weights import SpecWeights, _Reader
from tests.support.tiny_gguf import F32, tiny_model, write_gguf

MakeModel = Callable[..., Path]
IDS = [5, 90, 17]
MODELS = {
    "separate head": {"untied_head": True},
    "tied head, biases, frequency factors": {"biases": True, "rope_freqs": True},
    "scales, linear scaling": {"scales": True, "rope_scaling": 4.0},
    "wide heads": {"head_dim": 128},
}


class Plain:
    """A llama model in loops over tokens and heads; nothing of it is the project's but the unpacking of codes."""

    def __init__(self, path: Path, n_heads: int, n_kv_heads: int, scaling: float) -> None:
        reader = _Reader(path)  # the package's, which alone does not know I2_S
        self.tensors = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in reader.tensors}
        self.matrices = {
            name: unpack_i2_s(data[: rows * cols // 4], rows, cols)
            * float(data[rows * cols // 4 :][:4].view("<f4")[0])
            for name, ((rows, cols), data) in reader.i2_s.items()
        }
        self.n_heads, self.n_kv_heads, self.scaling = n_heads, n_kv_heads, scaling

    def linear(self, x: list[float], name: str) -> np.ndarray:
        s = 127 / max(max(abs(v) for v in x), 1e-5)
        codes = np.array([max(-128, min(127, round(v * s))) for v in x])
        y = self.matrices[f"{name}.weight"] @ codes / s
        return y * self.tensors.get(f"{name}.scale", 1.0) + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, x: np.ndarray, name: str) -> list[float]:
        weight = self.tensors[f"{name}.weight"]
        return list(x / math.sqrt(sum(v * v for v in x) / len(x) + 1e-5) * weight)

    def rotate(self, head: np.ndarray, position: int) -> np.ndarray:
        factors, out = self.tensors.get("rope_freqs.weight"), []
        for i in range(len(head) // 2):
            angle = position / self.scaling * 500000.0 ** (-2 * i / len(head))
            z = complex(head[2 * i], head[2 * i + 1])
            z *= cmath.exp(1j * (angle if factors is None else angle / factors[i]))
            out += [z.real, z.imag]
        return np.array(out)

    def logits(self, token_ids: list[int], n_layers: int) -> np.ndarray:
        caches: list[tuple[list, list]] = [([], []) for _ in range(n_layers)]
        for position, token in enumerate(token_ids):
            x = self.tensors["token_embd.weight"][token]
            for layer, (keys, values) in enumerate(caches):
                blk = f"blk.{layer}."
                h = self.norm(x, blk + "attn_norm")
                q = self.linear(h, blk + "attn_q").reshape(self.n_heads, -1)
                k = self.linear(h, blk + "attn_k").reshape(self.n_kv_heads, -1)
                keys.append([self.rotate(head, position) for head in k])
                values.append(self.linear(h, blk + "attn_v").reshape(self.n_kv_heads, -1))
                merged: list[float] = []
                for head, one in enumerate(q):
                    group, turned = head * self.n_kv_heads // self.n_heads, self.rotate(one, position)
                    e = [math.exp(float(turned @ key[group]) / math.sqrt(one.size)) for key in keys]
                    merged += list(sum(w * v[group] for w, v in zip(e, values, strict=True)) / sum(e))
                x = x + self.linear(merged, blk + "attn_output")
                h = self.norm(x, blk + "ffn_norm")
                gate, up = self.linear(h, blk + "ffn_gate"), self.linear(h, blk + "ffn_up")
                gated = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
                x = x + self.linear(gated, blk + "ffn_down")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return head @ np.array(self.norm(x, "output_norm"))


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_model(make_model: MakeModel, name: str) -> None:
    shape = MODELS[name]
    path = make_model(arch="llama", n_heads=4, n_kv_heads=2, **shape)
    plain = Plain(path, 4, 2, shape.get("rope_scaling", 1.0))
    weights, state = SpecWeights(path), KVState()
    found = [list(forward(op_table(weights.config), weights, ids, state))[-1][1] for ids in (IDS[:2], IDS[2:])]
    np.testing.assert_allclose(found[-1][-1], plain.logits(IDS, 2), rtol=1e-9, atol=1e-12)
    assert np.abs(found[-1]).max() > 0.1


def test_every_optional_tensor_changes_the_result(make_model: MakeModel) -> None:
    """So that the test above compares models, not one model with itself."""
    ends = []
    for shape in ({}, *MODELS.values()):
        weights = SpecWeights(make_model(arch="llama", n_heads=4, n_kv_heads=2, **shape))
        ends.append(list(forward(op_table(weights.config), weights, IDS, KVState()))[-1][1][-1])
    assert all(not np.allclose(a, b, rtol=1e-3) for i, a in enumerate(ends) for b in ends[:i])


def test_frequencies() -> None:
    """Of Llama 3.1: divided by the pair's factor, all scaled alike."""
    factors = np.array([1.0, 2.0])
    np.testing.assert_allclose(rope_frequencies(4, base=100.0), [1.0, 0.1])
    np.testing.assert_allclose(rope_frequencies(4, factors, base=100.0, scale=0.5), [0.5, 0.025])
    x, at = np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.array([7])
    first = rope(x, at, factors, base=100.0, pairing="adjacent", scale=0.5)[0, 0]
    np.testing.assert_allclose(first[:2], [math.cos(3.5) - 2 * math.sin(3.5), math.sin(3.5) + 2 * math.cos(3.5)])


def test_what_is_rotated_and_added_is_in_the_graph(make_model: MakeModel) -> None:
    config = SpecWeights(make_model(arch="llama", biases=True, rope_freqs=True, untied_head=True)).config
    ops = {op.output: op for op in op_table(config)}
    assert ops["blk.1.k_rope"].weights == ("rope_freqs.weight",)
    assert ops["blk.1.attn_o_out"].weights == ("blk.1.attn_output.weight", "blk.1.attn_output.bias")
    assert ops["blk.1.ffn_down"].weights == ("blk.1.ffn_down.weight",)
    assert ops["result_output"].weights == ("output.weight",)
    assert not any("sub_norm" in name for name in ops)


@pytest.mark.parametrize(
    "extra", ["blk.0.attn_sub_norm.weight", "blk.0.ffn_down.bias", "blk.1.attn_q.bias", "output.scale"]
)
def test_tensors_without_a_use_are_refused(tmp_path: Path, extra: str) -> None:
    metadata, tensors, _ = tiny_model(sub_norms=False)
    metadata = {key.replace("bitnet-b1.58", "llama"): value for key, value in metadata.items()}
    metadata["general.architecture"] = (metadata["general.architecture"][0], "llama")
    healthy = SpecWeights(write_gguf(tmp_path / "healthy.gguf", metadata, tensors))
    assert healthy.config.rope_pairing == "adjacent"
    tensors[extra] = F32, (128,), np.ones(128, "<f4").tobytes()
    with pytest.raises(BadInputError, match=extra):
        SpecWeights(write_gguf(tmp_path / "extra.gguf", metadata, tensors))


def test_the_package_reads_the_new_tensors_as_they_are(make_model: MakeModel) -> None:
    path = make_model(arch="llama", biases=True, rope_freqs=True)
    weights = SpecWeights(path)
    assert isinstance(weights._reader, GGUFReader)
    assert weights["blk.0.attn_k.bias"].shape == (64,)
    assert (np.diff(weights["rope_freqs.weight"]) >= 0).all()
