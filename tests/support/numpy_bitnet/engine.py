"""The forward pass. Every operation can be replaced, by a wrong one, in some layers and passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.numpy_bitnet.model import Matrix, Model
from tests.support.numpy_bitnet.styles import PLAIN, Array, Style

TENSORS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "attn_o_out": "attn_output",
    "ffn_gate": "ffn_gate", "ffn_up": "ffn_up", "ffn_down": "ffn_down",
}  # fmt: skip
"""Tap of a BitLinear -> its tensor."""
Quantised = tuple[Array, Array]
"""Codes, and the scale that they were multiplied by, last axis 1."""


@dataclass(frozen=True)
class Call:
    """One operation about to be computed."""

    engine: Engine
    op: str
    layer: int | None
    start: int
    """Position of the pass's first token."""
    tokens: tuple[int, ...]
    inputs: tuple[Any, ...]
    right: Callable[..., Array]
    """Computes the correct result, of the inputs or of others; takes overrides by name."""

    @property
    def n(self) -> int:
        """Tokens of the pass."""
        return len(self.tokens)

    @property
    def positions(self) -> np.ndarray:
        """Positions of the pass's tokens."""
        return self.start + np.arange(self.n)

    @property
    def decodes(self) -> bool:
        """Whether this is a single token after others."""
        return self.n == 1 and self.start > 0


@dataclass(frozen=True)
class Mistake:
    """Replaces operations: ``code`` gets the call and returns the result that the engine uses."""

    name: str
    ops: tuple[str, ...]
    code: Callable[[Call], Array]
    layers: frozenset[int] | None = None
    """None: every layer (and what is outside the layers)."""
    kind: str | None = None
    """``prefill`` or ``decode``; None: both."""

    def applies(self, call: Call) -> bool:
        """Return whether this operation is replaced."""
        return (
            call.op in self.ops
            and (self.layers is None or call.layer is None or call.layer in self.layers)
            and self.kind in (None, "decode" if call.decodes else "prefill")
        )


def to_f16(x: Array) -> Array:
    """Round to binary16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(np.float16).astype(x.dtype)


def to_bf16(x: Array) -> Array:
    """Round to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(x.dtype)


@dataclass
class Engine:
    """A model, its keys and values; ``forward`` takes the next tokens."""

    model: Model
    style: Style = PLAIN
    mistakes: Sequence[Mistake] = ()
    keys: dict[int, Array] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)
    start: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    """State kept between operations: by a fault, or digits that a recording loses."""

    def forward(self, tokens: Sequence[int]) -> dict[str, Array]:
        """Return every tap of the next pass; those of the head for its last token only."""
        self._tokens = tuple(tokens)
        self.taps: dict[str, Array] = {}
        positions = self.start + np.arange(len(tokens))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            x = self._do("inp_embd", None, self.embed, np.asarray(tokens))
            for layer in range(self.model.n_layers):
                x = self._layer(layer, x, positions)
            h = self._do("result_norm", None, self.norm_of("output_norm"), x[-1:])
            self._do("result_output", None, self.head, h)
        self.start += len(tokens)
        return self.taps

    def _do(self, op: str, layer: int | None, right: Callable[..., Array], *inputs: Any) -> Array:
        call = Call(self, op, layer, self.start, self._tokens, inputs, right)
        wrong = next((one for one in self.mistakes if one.applies(call)), None)
        value = right(*inputs) if wrong is None else wrong.code(call)
        if not op.endswith("_cache"):
            value = self.rounded(value)
            self.taps[op if layer is None else f"blk.{layer}.{op}"] = value
        return value

    def rounded(self, value: Array) -> Array:
        """Return what is kept of an operation's output: all of it, unless the engine computes in fewer bits."""
        return value

    def _layer(self, layer: int, x: Array, positions: np.ndarray) -> Array:
        m, b = self.model, f"blk.{layer}."

        def linear(op: str, a: Array) -> Array:
            return self._do(op, layer, self.bitlinear_of(b + TENSORS[op], op), a)

        h = self._do("attn_norm", layer, self.norm_of(b + "attn_norm"), x)
        q, k, v = (linear(op, h) for op in ("q", "k", "v"))
        q, k = (self._do(f"{op}_rope", layer, self.rope, a, positions) for op, a in (("q", q), ("k", k)))
        none = np.empty((0, m.n_kv_heads, m.head_dim), self.style.dtype)
        self.keys[layer] = self._do("k_cache", layer, self.store_k, self.keys.get(layer, none), k)
        self.values[layer] = self._do("v_cache", layer, self.store_v, self.values.get(layer, none), v)
        kq = self._do("kq", layer, self.scores, q, self.keys[layer])
        p = self._do("kq_soft_max", layer, self.softmax, kq, positions)
        o = self._do("kqv_out", layer, self.attend, p, self.values[layer])
        o = self._do("attn_sub_norm", layer, self.norm_of(b + "attn_sub_norm"), o)
        o = linear("attn_o_out", o)
        x = self._do("ffn_inp", layer, self.add, o, x)
        h = self._do("ffn_norm", layer, self.norm_of(b + "ffn_norm"), x)
        gate, up = (linear(op, h) for op in ("ffn_gate", "ffn_up"))
        act = self._do("ffn_act", layer, self.squared_relu, gate)
        f = self._do("ffn_out", layer, self.multiply, act, up)
        f = self._do("ffn_sub_norm", layer, self.norm_of(b + "ffn_sub_norm"), f)
        f = linear("ffn_down", f)
        return self._do("l_out", layer, self.add, f, x)

    # --- the operations, each as the style has it -------------------------------------------------------------

    def embed(self, tokens: np.ndarray) -> Array:
        """Return the rows of the tokens."""
        return self.model.embedding[tokens].astype(self.style.dtype)

    def norm_of(self, name: str) -> Callable[..., Array]:
        """Return the RMS norm with a tensor's weight; ``eps`` and ``weight`` may be overridden."""

        def norm(x: Array, *, eps: float = self.model.eps, weight: Array | None = None) -> Array:
            w = (self.model.vector(name) if weight is None else weight).astype(x.dtype)
            root = np.sqrt(self._mean_square(x) + x.dtype.type(eps))
            if self.style.norm == "rsqrt":
                return x * (1 / root) * w
            return x / root * w

        return norm

    def _mean_square(self, x: Array) -> Array:
        if self.style.norm == "sequential":
            total: Array = np.cumsum(x * x, axis=-1)[..., -1:]
            return total / x.dtype.type(x.shape[-1])
        if self.style.norm == "float64":
            return np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True).astype(x.dtype)
        mean: Array = np.mean(x * x, axis=-1, keepdims=True)
        return mean

    def quantise(self, x: Array) -> Quantised:
        """Return int8 codes and their scale, per token."""
        f = x.dtype.type
        top = np.maximum(np.abs(x).max(axis=-1, keepdims=True), f(1e-5))
        match self.style.quantiser:
            case "divide":
                step = top / f(127)
                return np.rint(x / step), 1 / step
            case "fused":
                scale = f(127) / top
                return np.rint(x.astype(np.float64) * scale).astype(x.dtype), scale
            case "float64":
                exact = 127.0 / top.astype(np.float64)
                return np.rint(x * exact).astype(x.dtype), exact.astype(x.dtype)
            case "reciprocal":
                scale = f(127) * (1 / top)
                return np.rint(x * scale), scale
            case _:
                scale = f(127) / top
                return np.rint(x * scale), scale

    def bitlinear_of(self, name: str, op: str) -> Callable[..., Array]:
        """Return the product with a ternary tensor; ``quantise`` and ``matrix`` may be overridden."""

        def bitlinear(
            x: Array, *, quantise: Callable[[Array], Quantised] = self.quantise, matrix: Matrix | None = None
        ) -> Array:
            m = self.model.matrix(name) if matrix is None else matrix
            y = self.multiply_codes(*quantise(x), m)
            return y.reshape(len(x), -1, self.model.head_dim) if op in "qkv" else y

        return bitlinear

    def multiply_codes(self, codes: Array, scale: Array, m: Matrix) -> Array:
        """Multiply codes by a ternary matrix and undo both scales."""
        f = codes.dtype.type
        signs, ws, dot = m.signs.astype(codes.dtype, copy=False), f(m.scale), self.style.dot
        match self.style.weights:
            case "weights":
                return dot(codes, signs * ws) / scale
            case "activations":
                return dot(codes / scale, signs) * ws
            case "both":
                return dot(codes / scale, signs * ws)
            case _:
                if self.style.residual == "fused":
                    exact = blas_integers(codes, signs).astype(np.float64) / scale * m.scale
                    self.memory["unrounded"] = exact
                    return exact.astype(codes.dtype)
                return blas_integers(codes, signs) / scale * ws

    def rope(
        self,
        x: Array,
        positions: np.ndarray,
        *,
        table: Callable[[Array], Array] | None = None,
        base: float | None = None,
    ) -> Array:
        """Rotate split halves; ``table`` rounds the cosines and sines, ``base`` may be overridden."""
        half = x.shape[-1] // 2
        cos, sin = self._turns(positions, half, self.model.base if base is None else base, x.dtype)
        if table is not None:
            cos, sin = table(cos), table(sin)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _turns(self, positions: np.ndarray, half: int, base: float, dtype: Any) -> tuple[Array, Array]:
        match self.style.rope:
            case "recurrence":
                ratio = np.float32(base) ** np.float32(-1 / half)
                theta, rows = positions.astype(np.float32), []
                for _ in range(half):
                    rows.append(theta)
                    theta = theta * ratio
                angles = np.stack(rows, -1)
            case "angles":
                angles = positions[:, None].astype(np.float32) * (base ** (-np.arange(half) / half)).astype(
                    np.float32
                )
            case _:
                angles = positions[:, None] * base ** (-np.arange(half) / half)
        return np.cos(angles)[:, None].astype(dtype), np.sin(angles)[:, None].astype(dtype)

    def store_k(self, old: Array, new: Array) -> Array:
        """Append keys to the cache."""
        return np.concatenate([old, to_f16(new) if self.style.k16 else new])

    def store_v(self, old: Array, new: Array) -> Array:
        """Append values to the cache."""
        return np.concatenate([old, to_f16(new) if self.style.v16 else new])

    def kv_heads(self) -> np.ndarray:
        """Return the key/value head of every query head."""
        return np.arange(self.model.n_heads) // (self.model.n_heads // self.model.n_kv_heads)

    def scores(self, q: Array, keys: Array, *, heads: np.ndarray | None = None) -> Array:
        """Multiply queries and keys: ``(n_heads, n_tokens, n_kv)``; ``heads`` may be overridden."""
        heads = self.kv_heads() if heads is None else heads
        q = to_f16(q) if self.style.q16 else q
        return self.style.dot(q.transpose(1, 0, 2), keys[:, heads].transpose(1, 0, 2))

    def softmax(self, kq: Array, positions: np.ndarray, *, scale: float | None = None, ahead: int = 0) -> Array:
        """Turn scores into weights; ``scale`` and how far ahead a token sees may be overridden."""
        f = kq.dtype.type
        factor = f(1 / np.sqrt(self.model.head_dim) if scale is None else scale)
        seen = np.arange(kq.shape[-1]) <= positions[:, None] + ahead
        x = kq * factor
        if self.style.softmax == "float64":
            e = np.where(seen, np.exp(np.where(seen, x, 0).astype(np.float64)), 0)
            return (e / e.sum(-1, keepdims=True)).astype(kq.dtype)
        x = np.where(seen, x, f(-np.inf))
        x = x - x.max(-1, keepdims=True)
        e = np.exp2(x * f(1 / np.log(2))) if self.style.softmax == "exp2" else np.exp(x)
        weights: Array = e / e.sum(-1, keepdims=True)
        return weights

    def attend(self, p: Array, values: Array, *, heads: np.ndarray | None = None) -> Array:
        """Sum the values by weight and join the heads; ``heads`` may be overridden."""
        heads = self.kv_heads() if heads is None else heads
        p = to_f16(p) if self.style.p16 else p
        joined = self.style.dot(p, values[:, heads].transpose(1, 2, 0))
        return joined.transpose(1, 0, 2).reshape(p.shape[1], -1)

    def squared_relu(self, gate: Array) -> Array:
        """Square what is positive."""
        return np.maximum(gate, 0) ** 2

    def multiply(self, a: Array, b: Array) -> Array:
        """Multiply elementwise."""
        return a * b

    def add(self, a: Array, b: Array) -> Array:
        """Add a branch to the stream."""
        exact = self.memory.get("unrounded")
        if exact is not None and np.array_equal(exact.astype(a.dtype), a):
            return (exact + b).astype(a.dtype)
        return a + b

    def head(self, x: Array) -> Array:
        """Multiply by the embedding."""
        return self.style.dot(x, self.model.embedding.astype(x.dtype, copy=False))


def blas_integers(codes: Array, signs: Array) -> Array:
    """Sum integers: exact in any order."""
    return codes @ signs.T
