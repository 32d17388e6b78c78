"""PyTorch models for tests, and the line that says why they are skipped where PyTorch is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.model.weights import SpecWeights

HOW_TO_GET = "not installed: pip install 'bitnet-parity[hf]'"


def need(*packages: str) -> None:
    """Skip the calling module, with one line for all of them, where a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} {HOW_TO_GET}", allow_module_level=True)


def fused_state(weights: SpecWeights, dtype: Any, pack: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Return a file's weights by the names of the model in bitnet.cpp's ``gpu/`` folder.

    One matrix for q, k and v, another for gate and up; heads ordered for rotation of adjacent pairs. Ternary
    matrices are brought back to their size in ``dtype``, or packed by ``pack`` (of signs, int8), with four scales.
    """
    import torch

    c = weights.config

    def vector(name: str) -> Any:
        return torch.from_numpy(np.array(weights[name], np.float32)).to(dtype)

    def matrix(name: str, *parts: str, adjacent: int = 0) -> Iterator[tuple[str, Any]]:
        given: list[Any] = [weights[f"{part}.weight"] for part in parts]
        scales = torch.tensor([float(one.scale) for one in given]).to(dtype)
        ordered = []
        for index, one in enumerate(given):
            rows = np.arange(len(one.signs)).reshape(-1, c.head_dim)
            if index < adjacent:
                rows = rows.reshape(len(rows), 2, -1).swapaxes(1, 2)
            ordered.append(torch.from_numpy(np.asarray(one.signs[rows.reshape(-1)], np.int8)))
        if pack is None:
            yield f"{name}.weight", torch.cat([one * scale for one, scale in zip(ordered, scales, strict=True)])
        else:
            yield f"{name}.weight", pack(torch.cat(ordered))
            yield f"{name}.weight_scale", torch.nn.functional.pad(scales, (0, 4 - len(scales)))

    state = {
        "tok_embeddings.weight": vector("token_embd.weight"),
        "norm.weight": vector("output_norm.weight"),
        "output.weight": vector("token_embd.weight" if c.tied_head else "output.weight"),
    }
    for i in range(c.n_layers):
        of, at = f"layers.{i}", f"blk.{i}"
        state |= matrix(f"{of}.attention.wqkv", *(f"{at}.attn_{part}" for part in "qkv"), adjacent=2)
        state |= matrix(f"{of}.attention.wo", f"{at}.attn_output")
        state |= matrix(f"{of}.feed_forward.w13", f"{at}.ffn_gate", f"{at}.ffn_up")
        state |= matrix(f"{of}.feed_forward.w2", f"{at}.ffn_down")
        state[f"{of}.attention_norm.weight"] = vector(f"{at}.attn_norm.weight")
        state[f"{of}.attention.attn_sub_norm.weight"] = vector(f"{at}.attn_sub_norm.weight")
        state[f"{of}.ffn_norm.weight"] = vector(f"{at}.ffn_norm.weight")
        state[f"{of}.feed_forward.ffn_sub_norm.weight"] = vector(f"{at}.ffn_sub_norm.weight")
    return state


def fused_model(path: Path) -> tuple[Any, Any]:
    """Return a module named and fused as the one in bitnet.cpp's ``gpu/`` folder, and a function that runs it.

    Tokens without a batch axis; activations and weights are quantised, dequantised and multiplied in float32.
    """
    import torch
    from torch import nn

    weights = SpecWeights(path)
    c = weights.config

    class Holder(nn.Module):
        weight: Any

    class Norm(Holder):
        def forward(self, x: Any) -> Any:
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c.rms_eps) * self.weight

    class Linear(Holder):
        def forward(self, x: Any) -> Any:
            scale = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
            return torch.nn.functional.linear((x * scale).round().clamp(-128, 127) / scale, self.weight)

    class Embedding(Holder):
        def forward(self, ids: Any) -> Any:
            return self.weight[ids]

    class Head(Holder):
        def forward(self, x: Any) -> Any:
            return x @ self.weight.T

    def rotate(x: Any, positions: Any) -> Any:
        angles = positions[:, None] * c.rope_base ** (
            -torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        )
        cos, sin = (f(angles).float()[:, None] for f in (torch.cos, torch.sin))
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wqkv, self.wo, self.attn_sub_norm = Linear(), Linear(), Norm()
            self.cache: list[Any] = []

        def forward(self, x: Any, positions: Any) -> Any:
            width = c.n_kv_heads * c.head_dim
            q, k, v = self.wqkv(x).split([c.n_heads * c.head_dim, width, width], -1)
            q, k, v = (one.unflatten(-1, (-1, c.head_dim)) for one in (q, k, v))
            self.cache = [] if positions[0] == 0 else self.cache
            self.cache.append((rotate(k, positions), v))
            keys, values = (
                torch.cat(parts).repeat_interleave(c.n_heads // c.n_kv_heads, 1)
                for parts in zip(*self.cache, strict=True)
            )
            scores = torch.einsum("qhd,khd->hqk", rotate(q, positions), keys) / c.head_dim**0.5
            later = torch.arange(len(keys))[None] > positions[:, None]
            mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), values)
            return self.wo(self.attn_sub_norm(mixed.flatten(1)))

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w13, self.w2, self.ffn_sub_norm = Linear(), Linear(), Norm()

        def forward(self, x: Any) -> Any:
            gate, up = self.w13(x).chunk(2, -1)
            return self.w2(self.ffn_sub_norm(gate.relu() ** 2 * up))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.feed_forward = Attention(), FeedForward()
            self.attention_norm, self.ffn_norm = Norm(), Norm()

        def forward(self, x: Any, positions: Any) -> Any:
            x = x + self.attention.forward(self.attention_norm(x), positions)  # past the hooks, as there
            return x + self.feed_forward(self.ffn_norm(x))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings, self.norm, self.output = Embedding(), Norm(), Head()
            self.layers = nn.ModuleList(Block() for _ in range(c.n_layers))

        def forward(self, ids: Any, start: int) -> Any:
            x, positions = self.tok_embeddings(ids), torch.arange(start, start + len(ids))
            for layer in self.layers:
                x = layer(x, positions)
            return self.output(self.norm(x))

    model = Transformer().eval()
    for name, values in fused_state(weights, torch.float32).items():
        model.get_submodule(name.removesuffix(".weight")).weight = values

    def forward(token_ids: Sequence[int], start: int) -> Any:
        return model(torch.tensor(list(token_ids)), start)

    return model, forward
