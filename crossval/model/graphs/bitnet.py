"""BitNet b1.58: BitLinear projections, sub-norms before the output projections, a gated feed-forward block.

The gate is squared ReLU in 2B-4T and SiLU in the models of architecture ``bitnet``; all else is the same.

Sources: arXiv 2504.12285 and 2402.17764; tap names follow the graph callbacks of bitnet.cpp
(``llm_build_bitnet_158``).
"""

from __future__ import annotations

import math
from typing import Any

from crossval.model.config import SpecConfig
from crossval.model.kinds import (
    ACTIVATIONS,
    Add,
    Attend,
    AttentionScores,
    BitLinear,
    Embedding,
    Head,
    Kind,
    Multiply,
    RmsNorm,
    Rope,
    Softmax,
)
from crossval.model.op import Axis, Op

HIDDEN: tuple[Axis, ...] = ("n_tokens", "dim")
WIDE: tuple[Axis, ...] = ("n_tokens", "hidden_dim")
QUERIES: tuple[Axis, ...] = ("n_tokens", "n_heads", "head_dim")
KEYS: tuple[Axis, ...] = ("n_tokens", "n_kv_heads", "head_dim")
SCORES: tuple[Axis, ...] = ("n_heads", "n_tokens", "n_kv")
MERGED: tuple[Axis, ...] = ("n_tokens", "q_dim")
LOGITS: tuple[Axis, ...] = ("n_tokens", "vocab_size")


def operations(c: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    embedding, head = "token_embd.weight", "token_embd.weight" if c.tied_head else "output.weight"
    ops = [Op("inp_embd", None, Embedding(), ("token_ids",), (embedding,), HIDDEN)]
    for layer in range(c.n_layers):
        ops += _layer(c, layer, x=ops[-1].output)
    norm = Op(
        "result_norm", None, RmsNorm(c.rms_eps), (ops[-1].output,), ("output_norm.weight",), HIDDEN,
        output_rows=True, last_row_only=True,
    )  # fmt: skip
    logits = Op(
        "result_output", None, Head(), (norm.output,), (head,), LOGITS, output_rows=True, last_row_only=True
    )
    return (*ops, norm, logits)


def _layer(c: SpecConfig, layer: int, x: str) -> list[Op]:
    """List the operations of one transformer layer whose input is the tap ``x``."""
    ops: list[Op] = []
    norm = RmsNorm(c.rms_eps)
    rope = Rope(c.rope_base, c.rope_pairing)

    def op(
        name: str, kind: Kind, *inputs: str, axes: tuple[Axis, ...], weight: str | None = None, **facts: Any
    ) -> str:
        weights = () if weight is None else (f"blk.{layer}.{weight}.weight",)
        ops.append(Op(name, layer, kind, inputs, weights, axes, **facts))
        return ops[-1].output

    h = op("attn_norm", norm, x, weight="attn_norm", axes=HIDDEN)
    q = op("q", BitLinear(c.n_heads), h, weight="attn_q", axes=QUERIES)
    k = op("k", BitLinear(c.n_kv_heads), h, weight="attn_k", axes=KEYS)
    k_cache, v_cache = f"blk.{layer}.k_cache", f"blk.{layer}.v_cache"
    op("v", BitLinear(c.n_kv_heads), h, weight="attn_v", axes=KEYS, appends_to=v_cache)
    q = op("q_rope", rope, q, "positions", axes=QUERIES)
    op("k_rope", rope, k, "positions", axes=KEYS, appends_to=k_cache)
    kq = op("kq", AttentionScores(), q, k_cache, axes=SCORES)
    weights = op("kq_soft_max", Softmax(1.0 / math.sqrt(c.head_dim)), kq, "positions", axes=SCORES)
    h = op("kqv_out", Attend(), weights, v_cache, axes=MERGED)
    if c.attn_sub_norm:
        h = op("attn_sub_norm", norm, h, weight="attn_sub_norm", axes=MERGED, optional=True)
    h = op("attn_o_out", BitLinear(), h, weight="attn_output", axes=HIDDEN)
    rows: dict[str, Any] = {"output_rows": layer == c.n_layers - 1}  # no token attends to these any more
    x = op("ffn_inp", Add(), h, x, axes=HIDDEN, **rows)
    h = op("ffn_norm", norm, x, weight="ffn_norm", axes=HIDDEN, **rows)
    gate = op("ffn_gate", BitLinear(), h, weight="ffn_gate", axes=WIDE, **rows)
    up = op("ffn_up", BitLinear(), h, weight="ffn_up", axes=WIDE, **rows)
    h = op("ffn_act", ACTIVATIONS[c.activation], gate, axes=WIDE, **rows)
    h = op("ffn_out", Multiply(), h, up, axes=WIDE, **rows)
    if c.ffn_sub_norm:
        h = op("ffn_sub_norm", norm, h, weight="ffn_sub_norm", axes=WIDE, optional=True, **rows)
    h = op("ffn_down", BitLinear(), h, weight="ffn_down", axes=HIDDEN, **rows)
    op("l_out", Add(), h, x, axes=HIDDEN, **rows)
    return ops
