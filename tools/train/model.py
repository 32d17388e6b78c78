"""The network of BitNet b1.58 2B-4T in PyTorch, quantisation-aware.

Forward passes round as inference does: ternary weights with one absmean scale per matrix ("The Era
of 1-bit LLMs", equations 1-3), activations rounded to int8 per token, the embedding rounded to F16.
Gradients pass through the roundings unchanged (straight-through estimator).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.train.shape import Shape


def quantize_weight(weight: Tensor) -> Tensor:
    """Return ``weight`` rounded to scale * {-1, 0, +1}; the gradient is that of ``weight``."""
    gamma = weight.detach().abs().mean().clamp(min=1e-5)
    rounded = (weight / gamma).round().clamp(-1, 1) * gamma
    return weight + (rounded - weight).detach()


def quantize_activation(x: Tensor) -> Tensor:
    """Return ``x`` rounded to 8 bits per token (last axis); the gradient is that of ``x``."""
    scale = 127.0 / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    rounded = (x * scale).round() / scale
    return x + (rounded - x).detach()


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class BitLinear(nn.Module):
    """A matrix (rows, cols) of ternary weights, applied to 8-bit activations; no bias."""

    def __init__(self, rows: int, cols: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, cols) * (gain / math.sqrt(cols)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last axis, cols wide, which is already quantised."""
        return functional.linear(x, quantize_weight(self.weight))


def rope_table(shape: Shape, n_positions: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (n_positions, head_dim / 2) of the RoPE angles."""
    half = shape.head_dim // 2
    frequencies = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of ``x`` (..., n_positions, head_dim): the NeoX order."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


class Layer(nn.Module):
    """One transformer layer; attribute names are the tensors' names in GGUF."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        branch = 1 / math.sqrt(2 * shape.n_layers)
        for name, (rows, cols) in shape.matrices().items():
            self.add_module(name, BitLinear(rows, cols, branch if name in ("attn_output", "ffn_down") else 1.0))
        for name, width in shape.norms().items():
            self.add_module(name, RMSNorm(width, shape.rms_eps))

    if TYPE_CHECKING:  # registered by name above

        def __getattr__(self, name: str) -> nn.Module:
            """Return a submodule."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the residual stream after the layer; ``x`` (batch, n_tokens, dim)."""
        shape = self.shape
        batch, n_tokens, _ = x.shape
        h = quantize_activation(self.attn_norm(x))
        q = self.attn_q(h).view(batch, n_tokens, shape.n_heads, shape.head_dim).transpose(1, 2)
        k = self.attn_k(h).view(batch, n_tokens, shape.n_kv_heads, shape.head_dim).transpose(1, 2)
        v = self.attn_v(h).view(batch, n_tokens, shape.n_kv_heads, shape.head_dim).transpose(1, 2)
        groups = shape.n_heads // shape.n_kv_heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = heads.transpose(1, 2).reshape(batch, n_tokens, shape.dim)
        x = x + self.attn_output(quantize_activation(self.attn_sub_norm(h)))
        h = quantize_activation(self.ffn_norm(x))
        h = functional.relu(self.ffn_gate(h)).square() * self.ffn_up(h)
        out: Tensor = x + self.ffn_down(quantize_activation(self.ffn_sub_norm(h)))
        return out


class BitNet(nn.Module):
    """The whole network, with the embedding as tied LM head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, n_positions: int = 128) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.vocab_size, shape.dim) / math.sqrt(shape.dim))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.output_norm = RMSNorm(shape.dim, shape.rms_eps)
        cos, sin = rope_table(shape, n_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def embedding(self) -> Tensor:
        """Return the embedding as the file stores it, rounded to F16."""
        table = self.token_embd
        return table + (table.half().float() - table).detach()

    def forward(self, ids: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the logits of ``ids`` (batch, n_tokens), or of the flat positions ``rows`` only.

        ``mask`` (batch, 1, n_tokens, n_tokens): True where a token may attend.
        """
        n_tokens = ids.shape[1]
        cos, sin = self.cos[:n_tokens], self.sin[:n_tokens]
        table = self.embedding()
        x = functional.embedding(ids, table)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        if rows is not None:
            x = x.reshape(-1, self.shape.dim)[rows]
        return functional.linear(self.output_norm(x), table)
