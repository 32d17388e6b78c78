"""PyTorch models for tests, and the line that says why they are skipped where PyTorch is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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


def fused_model(path: Path) -> tuple[Any, Any]:
    """Return a module named and fused as the one in bitnet.cpp's ``gpu/`` folder, and a function that runs it.

    One matrix for q, k and v, another for gate and up; heads ordered for rotation of adjacent pairs; tokens
    without a batch axis; activations and weights are quantised, dequantised and multiplied in float32.
    """
    import torch
    from torch import nn

    weights = SpecWeights(path)
    c = weights.config

    def matrix(*names: str, adjacent: int = 0) -> Any:
        parts = []
        for index, name in enumerate(names):
            given: Any = weights[name]
            rows = np.arange(len(given.signs)).reshape(-1, c.head_dim)
            if index < adjacent:
                rows = rows.reshape(len(rows), 2, -1).swapaxes(1, 2)
            parts.append((given.signs * np.float32(given.scale))[rows.reshape(-1)])
        return torch.from_numpy(np.concatenate(parts))

    class Norm(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.weight = torch.from_numpy(np.asarray(weights[name], np.float32))

        def forward(self, x: Any) -> Any:
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c.rms_eps) * self.weight

    class Linear(nn.Module):
        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Any) -> Any:
            scale = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
            return torch.nn.functional.linear((x * scale).round().clamp(-128, 127) / scale, self.weight)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.from_numpy(np.asarray(weights["token_embd.weight"], np.float32))

    class Embedding(Plain):
        def forward(self, ids: Any) -> Any:
            return self.weight[ids]

    class Head(Plain):
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
        def __init__(self, at: str) -> None:
            super().__init__()
            names = (f"{at}.attn_{part}.weight" for part in "qkv")
            self.wqkv = Linear(matrix(*names, adjacent=2))
            self.wo = Linear(matrix(f"{at}.attn_output.weight"))
            self.attn_sub_norm = Norm(f"{at}.attn_sub_norm.weight")
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
        def __init__(self, at: str) -> None:
            super().__init__()
            self.w13 = Linear(matrix(f"{at}.ffn_gate.weight", f"{at}.ffn_up.weight"))
            self.w2 = Linear(matrix(f"{at}.ffn_down.weight"))
            self.ffn_sub_norm = Norm(f"{at}.ffn_sub_norm.weight")

        def forward(self, x: Any) -> Any:
            gate, up = self.w13(x).chunk(2, -1)
            return self.w2(self.ffn_sub_norm(gate.relu() ** 2 * up))

    class Block(nn.Module):
        def __init__(self, at: str) -> None:
            super().__init__()
            self.attention, self.feed_forward = Attention(at), FeedForward(at)
            self.attention_norm, self.ffn_norm = Norm(f"{at}.attn_norm.weight"), Norm(f"{at}.ffn_norm.weight")

        def forward(self, x: Any, positions: Any) -> Any:
            x = x + self.attention.forward(self.attention_norm(x), positions)  # past the hooks, as there
            return x + self.feed_forward(self.ffn_norm(x))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings, self.norm, self.output = Embedding(), Norm("output_norm.weight"), Head()
            self.layers = nn.ModuleList(Block(f"blk.{i}") for i in range(c.n_layers))

        def forward(self, ids: Any, start: int) -> Any:
            x, positions = self.tok_embeddings(ids), torch.arange(start, start + len(ids))
            for layer in self.layers:
                x = layer(x, positions)
            return self.output(self.norm(x))

    model = Transformer().eval()

    def forward(token_ids: Sequence[int], start: int) -> Any:
        return model(torch.tensor(list(token_ids)), start)

    return model, forward
