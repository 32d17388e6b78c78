"""Bugs of the kinds that traces with few taps have hidden: precision, quantiser, norm, mask, scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tests.support.numpy_bitnet.engine import TENSORS, Call, Mistake, Quantised, to_bf16, to_f16
from tests.support.numpy_bitnet.styles import Array

BITLINEARS = tuple(TENSORS)
NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")
Round = Callable[[Array], Array]


def levels(
    top: float = 127,
    rounding: Round = np.rint,
    clamp: tuple[float, float] = (-128, 127),
    *,
    per_tensor: bool = False,
) -> Callable[[Array], Quantised]:
    """Return a quantiser that maps the largest magnitude to ``top``, rounds, and clamps."""

    def quantise(x: Array) -> Quantised:
        largest = np.abs(x).max(axis=None if per_tensor else -1, keepdims=True)
        scale = np.broadcast_to(x.dtype.type(top) / np.maximum(largest, x.dtype.type(1e-5)), (len(x), 1))
        return np.clip(rounding(x * scale), *clamp).astype(x.dtype), scale

    return quantise


def quantiser(name: str, quantise: Callable[[Array], Quantised]) -> Mistake:
    """Return every BitLinear with another quantiser."""
    return Mistake(name, BITLINEARS, lambda call: call.right(call.inputs[0], quantise=quantise))


def _float_row_sum(call: Call) -> Array:
    """Codes as 0, 1, 2, and the float activations' sum subtracted instead of the codes'."""
    (x,) = call.inputs
    codes, scale = call.engine.quantise(x)
    right = call.right(x)
    m = call.engine.model.matrix(f"blk.{call.layer}.{TENSORS[call.op]}")
    off = codes.sum(-1, keepdims=True) - (x * scale).sum(-1, keepdims=True)
    lost = off / scale * x.dtype.type(m.scale)
    return (right.reshape(len(x), -1) + lost).reshape(right.shape).astype(x.dtype)


def _layer_norm(call: Call) -> Array:
    (x,) = call.inputs
    return call.right(x - x.mean(-1, keepdims=True))


def _another_norm(call: Call) -> Array:
    other = {"attn_norm": "ffn_norm", "ffn_norm": "attn_norm", "attn_sub_norm": "attn_norm"}.get(call.op)
    engine = call.engine
    name = f"blk.{call.layer}.{other}" if other else f"blk.{(call.layer or 0) ^ 1}.{call.op}"
    return call.right(call.inputs[0], weight=engine.model.vector(name))


def _cache(rounding: Round) -> Callable[[Call], Array]:
    return lambda call: call.right(call.inputs[0], rounding(call.inputs[1]))


def _off_by(share: float) -> Callable[[Call], Array]:
    """Return a change that makes every value too large or too small by this factor."""

    def code(call: Call) -> Array:
        right = call.right(*call.inputs)
        signs = np.where(np.arange(right.shape[-1]) % 2, 1, -1)
        return (right * (1 + share * signs)).astype(right.dtype)

    return code


def _scale(factor: float) -> Callable[[Call], Array]:
    return lambda call: call.right(*call.inputs, scale=factor / np.sqrt(call.engine.model.head_dim))


def skipped(call: Call) -> Array:
    """Pass the first input on: no norm, or nothing added to the branch."""
    first: Array = call.inputs[0]
    return first


def silu(call: Call) -> Array:
    """Activate the gate with SiLU."""
    (gate,) = call.inputs
    activated: Array = gate / (1 + np.exp(-gate))
    return activated


MISTAKES: dict[str, Mistake] = {
    one.name: one
    for one in (
        quantiser("float activations", lambda x: (x, np.ones((len(x), 1), x.dtype))),
        quantiser("128 levels", levels(128)),
        quantiser("63 levels", levels(63)),
        quantiser("truncation", levels(rounding=np.trunc)),
        quantiser("floor", levels(rounding=np.floor)),
        quantiser("clamp at 126", levels(clamp=(-126, 126))),
        quantiser("per-tensor scale", levels(per_tensor=True)),
        Mistake("float row sum", BITLINEARS, _float_row_sum),
        Mistake("bf16 KV", ("k_cache", "v_cache"), _cache(to_bf16)),
        Mistake("F16 RoPE tables", ("q_rope", "k_rope"), lambda call: call.right(*call.inputs, table=to_f16)),
        Mistake("bf16 RoPE tables", ("q_rope", "k_rope"), lambda call: call.right(*call.inputs, table=to_bf16)),
        Mistake("LayerNorm", NORMS, _layer_norm),
        Mistake("another norm's weight", NORMS, _another_norm),
        Mistake("mask sees the next token", ("kq_soft_max",), lambda call: call.right(*call.inputs, ahead=1)),
        Mistake("KQ scale x sqrt 2", ("kq_soft_max",), _scale(2**0.5)),
        Mistake("KQ scale x 1.05", ("kq_soft_max",), _scale(1.05)),
        Mistake(
            "eps x 10", NORMS, lambda call: call.right(call.inputs[0], eps=10 * call.engine.model.eps)
        ),
        Mistake("V 19 % wrong", ("v",), _off_by(0.19)),
    )
}  # fmt: skip

TRUE_TAP = {"k_cache": "kq", "v_cache": "kqv_out"}
"""A value stored incorrectly shows first in the operation that reads it."""


def first_place(mistake: Mistake, op: str | None = None) -> str:
    """Return the full name of the first tap that a bug makes wrong; of one of its operations, if given."""
    op = op or mistake.ops[0]
    layer = 0 if mistake.layers is None else min(mistake.layers)
    return f"blk.{layer}.{TRUE_TAP.get(op, op)}"


def in_layers(mistake: Mistake, layers: Sequence[int]) -> Mistake:
    """Return the bug in some layers only."""
    return replace(mistake, layers=frozenset(layers))
