"""A whole model: what every pass has to give."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitnet_py.arithmetic import Arithmetic
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_main.attention import by_operations, flash
from tests.support.numpy_main.kernels import (
    F32,
    LIBM,
    bitlinear,
    cosf,
    dot,
    f16,
    fused,
    gated,
    gelu,
    sinf,
    tiled,
    tree,
)


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Return the norm: squares in binary32, their sum one after the other in binary64."""
    sums = np.add.accumulate((x * x).astype(np.float64), axis=-1)[..., -1]
    mean = (sums / x.shape[-1]).astype(np.float32)
    return x * (np.float32(1) / np.sqrt(mean + np.float32(eps)))[..., None] * weight


def rope(x: F32, positions: npt.NDArray[np.int64], base: float) -> F32:
    """Rotate halves of ``(n, heads, d)``."""
    half = x.shape[-1] // 2
    power = LIBM.powf
    power.restype, power.argtypes = ctypes.c_float, [ctypes.c_float, ctypes.c_float]
    ratio = np.float32(power(base, float(np.float32(-2) / np.float32(2 * half))))
    theta = [positions.astype(np.float32)]
    for _ in range(half - 1):
        theta.append(theta[-1] * ratio)
    c, s = (f(np.stack(theta, -1))[:, None] for f in (cosf, sinf))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([fused(a, c, -(b * s)), fused(a, s, b * c)], -1)


def pooled(h: F32, pooling: str, width: int) -> F32:
    """Return one row of ``(n, dim)``: the last, the first, or the mean as a product with 1 / n."""
    if pooling != "mean":
        return h[-1 if pooling == "last" else 0]
    n = len(h)
    weight = np.full(n, np.float32(1) / np.float32(n))
    whole = n // (4 * width) * 4 * width
    sums = np.zeros((h.shape[1], 4, width), np.float32)
    for i in range(0, whole, 4 * width):
        part = slice(i, i + 4 * width)
        sums = fused(h[part].T.reshape(sums.shape), weight[part].reshape(sums.shape[1:]), sums)
    joined = (sums[:, 0] + sums[:, 2]) + (sums[:, 1] + sums[:, 3])
    if width == 8:
        four = joined[:, :4] + joined[:, 4:]
        total = (four[:, 0] + four[:, 1]) + (four[:, 2] + four[:, 3])
    else:
        total = tree(joined)
    for i in range(whole, n):
        total = fused(h[i], weight[i], total)
    return total


class NumpyMain:
    """A model and its sequence; ``forward`` gives every tap of the next pass."""

    def __init__(self, model: Model, arithmetic: Arithmetic) -> None:
        self.model, self.arithmetic = model, arithmetic
        shape = (model.n_layers, 0, model.n_kv_heads, model.head_dim)
        self.keys, self.values = (np.zeros(shape, np.float16) for _ in range(2))
        self.n_tokens = 0

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, pooling: str | None = None
    ) -> dict[str, F32]:
        """Return the taps of a pass over ``ids``; ``result_output`` holds the logits."""
        m, n = self.model, len(ids)
        positions = self.n_tokens + np.arange(n)
        n_kv = -(-(self.n_tokens + n) // 256) * 256
        more = np.zeros((m.n_layers, n_kv - self.keys.shape[1], m.n_kv_heads, m.head_dim), np.float16)
        self.keys, self.values = (np.concatenate([held, more], 1) for held in (self.keys, self.values))
        x = m.embedding[np.asarray(ids)]
        taps = {"inp_embd": x}
        if m.arch == "gemma3":
            x = taps["inp_scaled"] = x * np.sqrt(np.float32(m.dim))
        rows = slice(None) if all_logits else slice(-1, None)
        for layer in range(m.n_layers):
            found = self._layer(layer, x, positions, rows if layer == m.n_layers - 1 else slice(None))
            x = found["l_out"]
            taps |= {f"blk.{layer}.{name}": value for name, value in found.items()}
        h = rms_norm(x, m.vector("output_norm"), m.eps)
        multiply = tiled if len(h) > 1 and len(m.embedding) % 4 == 0 else dot
        taps["result_norm"] = h
        taps["result_output"] = multiply(f16(m.embedding), f16(h)[:, None], self.arithmetic)
        if pooling is not None:
            taps["pooled"] = pooled(h, pooling, self.arithmetic.simd_width)[None]
        self.n_tokens += n
        return taps

    def _layer(self, layer: int, x: F32, positions: npt.NDArray[np.int64], rows: slice) -> dict[str, F32]:
        m, a, n, block = self.model, self.arithmetic, len(x), f"blk.{layer}."

        def linear(name: str, y: F32) -> F32:
            return bitlinear(y, m.matrix(block + name), a)

        def norm(name: str, y: F32) -> F32:
            return rms_norm(y, m.vector(block + name), m.eps)

        def head_norm(name: str, y: F32) -> F32:
            return rms_norm(y, m.vector(f"{block}attn_{name}"), m.eps)

        def optional(tap: str, name: str, y: F32) -> F32:
            if m.has(block + name):
                y = t[tap] = norm(name, y)
            return y

        t: dict[str, F32] = {"attn_norm": norm("attn_norm", x)}
        inputs = {name: optional(tap := f"attn_{name}_norm_in", tap, t["attn_norm"]) for name in ("q", "k", "v")}
        for name, n_heads in (("q", m.n_heads), ("k", m.n_kv_heads), ("v", m.n_kv_heads)):
            t[name] = linear(f"attn_{name}", inputs[name]).reshape(n, n_heads, m.head_dim)
        turned = {name: t[name] for name in ("q", "k")}
        if m.has(block + "attn_q_norm"):
            turned = {name: head_norm(f"{name}_norm", value) for name, value in turned.items()}
            t |= {f"{name}_norm": value for name, value in turned.items()}
        t |= {f"{name}_rope": rope(value, positions, m.base) for name, value in turned.items()}
        query, scale = t["q_rope"], np.float32(1) / np.sqrt(np.float32(m.head_dim))
        if m.arch == "gemma3":
            query, scale = t["q_rope"] * scale, np.float32(1)
            t["q_scaled"] = query
        self.keys[layer, positions], self.values[layer, positions] = f16(t["k_rope"]), f16(t["v"])
        cells = (self.keys[layer], self.values[layer])
        if a.flash_attention:
            t["kqv_out"] = flash(query, *cells, positions, scale, a)
        else:
            t |= by_operations(query, *cells, positions, scale, a)
            used = int(positions[-1]) + 1
            t |= {name: t[name][..., :used] for name in ("kq", "kq_soft_max")}
        own = m.arch in ("qwen3", "gemma3")
        y = optional("attn_sub_norm", "attn_output_norm_in" if own else "attn_sub_norm", t["kqv_out"])
        t["attn_o_out"] = linear("attn_output", y)
        y = optional("attn_post_norm", "post_attention_norm", t["attn_o_out"][rows])
        t["ffn_inp"] = y + x[rows]
        t["ffn_norm"] = norm("ffn_norm", t["ffn_inp"])
        for name in ("ffn_gate", "ffn_up"):
            t[name] = linear(name, optional(f"{name}_norm_in", f"{name}_norm_in", t["ffn_norm"]))
        width = a.simd_width if a.follow_reference or m.arch == "qwen3" else None
        if m.arch == "gemma3":
            t["ffn_act"], t["ffn_out"] = gelu(t["ffn_gate"], t["ffn_up"])
        else:
            t["ffn_act"], t["ffn_out"] = gated(t["ffn_gate"], t["ffn_up"], width)
        y = optional("ffn_sub_norm", "ffn_down_norm_in" if own else "ffn_sub_norm", t["ffn_out"])
        t["ffn_down"] = linear("ffn_down", y)
        y = optional("ffn_post_norm", "post_ffw_norm", t["ffn_down"])
        with np.errstate(invalid="ignore"):
            t["l_out"] = y + t["ffn_inp"]
        return t
