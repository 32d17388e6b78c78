"""The arithmetic of bitnet.cpp's main since July 2026: every rounding, in the order of each build.

The build for AVX512-FP16 adds in binary16; the others have 16 lanes (AVX-512) or 8 (AVX2). The exponential is
NumPy's, whose last bits differ from the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crossval.passes import Numerics
from tests.support.numpy_bitnet.engine import Engine, Quantised
from tests.support.numpy_bitnet.model import Matrix
from tests.support.numpy_bitnet.styles import Array

f16, f32, f64 = np.float16, np.float32, np.float64
PADDED = 256
"""Cells come in multiples of this."""


@dataclass(frozen=True)
class Build:
    """What the bits depend on."""

    lanes: int = 8
    binary16: bool = False
    flash: bool = False
    threads: int = 1
    relu: bool = False
    """Squared ReLU instead of what main computes: right for 2B-4T."""

    @property
    def numerics(self) -> Numerics:
        """What such an engine states."""
        return Numerics(
            simd_width=self.lanes,
            fused_quantizer=False,
            generation="main",
            binary16_sums=self.binary16,
            flash_attention=self.flash,
            attention_threads=self.threads if self.flash else None,
        )


def fma(a: Array, b: Array, c: Array, to: type = f32) -> Array:
    """Return ``a * b + c`` with one rounding to a format; the product of two inputs is exact in binary64."""
    product, term = np.broadcast_arrays(np.multiply(a, b, dtype=f64), np.asarray(c, f64))
    total = product + term
    split = total - product
    lost = (product - (total - split)) + (term - split)
    odd = np.where(np.isfinite(lost) & (lost != 0) & (total.view(np.int64) & 1 == 0), np.sign(lost), 0)
    exact: Array = np.where(odd == 0, total, np.nextafter(total, np.where(odd < 0, -np.inf, np.inf))).astype(to)
    return exact


def halved(x: Array) -> Array:
    """Add the upper half of the last axis to the lower one until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


@dataclass
class MainEngine(Engine):
    """A forward pass of main."""

    build: Build = field(default_factory=Build)

    def forward(self, tokens: Sequence[int]) -> dict[str, Array]:
        """Return every tap that main has."""
        found = super().forward(tokens)
        hidden = {"ffn_act", *(("kq", "kq_soft_max") if self.build.flash else ())}
        return {name: value for name, value in found.items() if name.rpartition(".")[2] not in hidden}

    # --- sums ---------------------------------------------------------------------------------------------

    def single(self, x: Array, y: Array) -> Array:
        """Multiply vectors of binary16 one by one: the last axes of two arrays."""
        x, y = np.broadcast_arrays(x.astype(f16), y.astype(f16))
        lanes, to = (32, f16) if self.build.binary16 else (self.build.lanes, f32)
        whole = x.shape[-1] // (4 * lanes) * 4 * lanes
        acc = np.zeros((*x.shape[:-1], 4, lanes), to)
        for at in range(0, whole, 4 * lanes):
            a, b = (one[..., at : at + 4 * lanes].reshape(acc.shape) for one in (x, y))
            acc = fma(a, b, acc, to)
        joined = (acc[..., 0, :] + acc[..., 2, :]) + (acc[..., 1, :] + acc[..., 3, :])
        if lanes == 8:
            four = joined[..., :4] + joined[..., 4:]
            total = ((four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])).astype(f64)
        else:
            total = halved(joined).astype(f64)
        for at in range(whole, x.shape[-1]):
            total = total + np.multiply(x[..., at], y[..., at], dtype=f32)
        result: Array = total.astype(f32)
        return result

    def batch(self, x: Array, y: Array) -> Array:
        """Multiply vectors of binary16 of a batch."""
        x, y = np.broadcast_arrays(x.astype(f16), y.astype(f16))
        acc = np.zeros((*x.shape[:-1], self.build.lanes), f32)
        for at in range(0, x.shape[-1], self.build.lanes):
            acc = fma(x[..., at : at + self.build.lanes], y[..., at : at + self.build.lanes], acc)
        return halved(acc)

    # --- operations ---------------------------------------------------------------------------------------

    def norm_of(self, name: str) -> Callable[..., Array]:
        """Return the RMS norm with a tensor's weight."""

        def norm(x: Array, *, eps: float = self.model.eps, weight: Array | None = None) -> Array:
            w = (self.model.vector(name) if weight is None else weight).astype(f32)
            total = np.cumsum((x * x).astype(f64), axis=-1)[..., -1:]
            root = np.sqrt((total / x.shape[-1]).astype(f32) + f32(eps))
            result: Array = x * (f32(1) / root) * w
            return result

        return norm

    def quantise(self, x: Array) -> Quantised:
        """Return int8 codes, halves away from zero, and their scale: 0 of an all-zero row."""
        top = np.abs(x).max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = np.where(top > 0, f32(127) / top, f32(0)).astype(f32)
            product = (x * scale).astype(f64)
            return np.clip(np.trunc(product + np.copysign(0.5, product)), -128, 127).astype(f32), scale

    def multiply_codes(self, codes: Array, scale: Array, m: Matrix) -> Array:
        """Multiply codes by a ternary matrix; one factor undoes both scales."""
        with np.errstate(divide="ignore", invalid="ignore"):
            result: Array = (codes @ m.signs.T).astype(f32) * (f32(m.scale) / scale).astype(f32)
        return result

    def rope(self, x: Array, positions: np.ndarray, **changed: Any) -> Array:
        """Rotate split halves."""
        if changed:
            return super().rope(x, positions, **changed)
        half = x.shape[-1] // 2
        ratio, angle, angles = f32(self.model.base ** (-1 / half)), positions.astype(f32), []
        for _ in range(half):
            angles.append(angle)
            angle = angle * ratio
        cos, sin = (turn(np.stack(angles, -1))[:, None].astype(f32) for turn in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([fma(a, cos, -(b * sin)), fma(a, sin, b * cos)], axis=-1)

    def store_k(self, old: Array, new: Array) -> Array:
        """Append keys to the cache."""
        return np.concatenate([old, new.astype(f16).astype(f32)])

    store_v = store_k

    def scores(self, q: Array, keys: Array, *, heads: np.ndarray | None = None) -> Array:
        """Multiply queries and keys."""
        heads = self.kv_heads() if heads is None else heads
        dot = self.single if len(q) == 1 else self.batch
        return dot(q.transpose(1, 0, 2)[:, :, None], keys[:, heads].transpose(1, 0, 2)[:, None])

    def softmax(self, kq: Array, positions: np.ndarray, *, scale: float | None = None, ahead: int = 0) -> Array:
        """Turn scores into weights."""
        factor = f32(1) / np.sqrt(f32(self.model.head_dim)) if scale is None else f32(scale)
        seen = np.arange(kq.shape[-1]) <= positions[:, None] + ahead
        x = np.where(seen, kq * f32(factor), f32(-np.inf))
        e = np.exp(x - x.max(-1, keepdims=True))
        return e * (1 / e.sum(-1, dtype=f64, keepdims=True)).astype(f32)

    def attend(self, p: Array, values: Array, *, heads: np.ndarray | None = None) -> Array:
        """Sum the values by weight over all cells, the empty ones included."""
        if self.build.flash:
            return self._flash(values)
        heads = self.kv_heads() if heads is None else heads
        empty = -len(values) % PADDED
        p = np.pad(p, ((0, 0), (0, 0), (0, empty)))
        v = np.pad(values[:, heads], ((0, empty), (0, 0), (0, 0))).transpose(1, 2, 0)[:, None]
        dot = self.single if p.shape[1] == 1 else self.batch
        return dot(p[:, :, None], v).transpose(1, 0, 2).reshape(p.shape[1], -1)

    def squared_relu(self, gate: Array) -> Array:
        """Activate the gate: with SiLU."""
        if self.build.relu:
            return super().squared_relu(gate)
        with np.errstate(over="ignore"):
            activated: Array = gate / (f32(1) + np.exp(-gate))
        return activated

    def head(self, x: Array) -> Array:
        """Multiply by the embedding."""
        dot = self.single if len(x) == 1 else self.batch
        return np.concatenate([dot(row, self.model.embedding.astype(f32))[None] for row in x])

    # --- flash attention ----------------------------------------------------------------------------------

    def _flash(self, values: Array) -> Array:
        layer = max(int(name.split(".")[1]) for name in self.taps if name.endswith(".q_rope"))
        q, keys = self.taps[f"blk.{layer}.q_rope"], self.keys[layer]
        n, heads = len(q), self.kv_heads()
        positions = self.start + np.arange(n)
        q, k, v = q.transpose(1, 0, 2), keys[:, heads].transpose(1, 0, 2), values[:, heads].transpose(1, 0, 2)
        scale = f32(1) / np.sqrt(f32(self.model.head_dim))
        if n >= 64 and self.model.head_dim % self.build.lanes == 0:
            return self._tiles(q, k, v, positions, scale)
        padded = max(PADDED, -(-len(values) // PADDED) * PADDED)
        n_threads = self.build.threads if n == 1 and padded >= 512 else 1
        each = -(-padded // n_threads)
        top, total = np.full(q.shape[:2], -np.inf, f32), np.zeros(q.shape[:2], f32)
        out = np.zeros(q.shape, f32)
        for first in range(0, len(values), each):
            cells = range(first, min(first + each, len(values)))
            t, s, a = self._cells(q, k, v, positions, scale, cells)
            if n_threads == 1:
                top, total, out = t, s, a
                continue
            both = np.maximum(top, t)
            old, new = np.exp(top - both), np.exp(t - both)
            out, total = fma(out, old[..., None], a * new[..., None]), fma(total, old, s * new)
            top = both
        return (out * (f32(1) / total)[..., None]).transpose(1, 0, 2).reshape(n, -1)

    def _cells(
        self, q: Array, k: Array, v: Array, positions: np.ndarray, scale: Array, cells: range
    ) -> tuple[Array, Array, Array]:
        top, total = np.full(q.shape[:2], -np.inf, f32), np.zeros(q.shape[:2], f32)
        out = np.zeros(q.shape, f16)
        narrow = q.shape[-1] // 128 * 128 if self.build.binary16 else 0
        for cell in cells:
            seen = cell <= positions
            score = self.single(q, k[:, cell][:, None]) * scale
            rises = score > top
            with np.errstate(invalid="ignore"):
                down = np.where(rises, np.exp(top - score), f32(1)).astype(f32)
                share = np.where(rises, f32(1), np.exp(score - top)).astype(f32)
            scaled = (out * down[..., None]).astype(f16)
            scaled[..., :narrow] = (out * down[..., None].astype(f16)).astype(f16)[..., :narrow]
            value = np.broadcast_to(v[:, cell][:, None], out.shape)
            new = fma(value, share[..., None], scaled).astype(f16)
            new[..., :narrow] = fma(value, share[..., None].astype(f16), scaled, f16)[..., :narrow]
            out = np.where(seen[None, :, None], new, out)
            total = np.where(seen, fma(total, down, share), total)
            top = np.where(seen & rises, score, top)
        return top, total, out.astype(f32)

    def _tiles(self, q: Array, k: Array, v: Array, positions: np.ndarray, scale: Array) -> Array:
        n, n_cells = q.shape[1], k.shape[1]
        top, total, out = np.full(q.shape[:2], -np.inf, f32), np.zeros(q.shape[:2], f32), np.zeros(q.shape, f32)
        for first in range(0, n_cells, 64):
            cells = np.arange(first, min(first + 64, n_cells))
            kq = np.zeros((*q.shape[:2], cells.size), f32)
            for d in range(q.shape[-1]):
                kq = fma(q[..., d, None], k[:, None, cells, d], kq)
            seen = cells <= positions[:, None]
            kq = np.where(seen, kq * scale, f32(-np.inf))
            new = np.maximum(top, kq.max(-1))
            live = seen.any(-1)
            down = np.where(new > top, np.exp(top - new), f32(1)).astype(f32)
            out, total = out * down[..., None], total * down
            share = np.exp(kq - new[..., None])
            total = np.where(live, (total.astype(f64) + share.sum(-1, dtype=f64)).astype(f32), total)
            for i in range(cells.size):
                out = fma(v[:, cells[i]][:, None], share[..., i, None], out)
            top = new
        result: Array = (out * (f32(1) / total)[..., None]).transpose(1, 0, 2).reshape(n, -1)
        return result
