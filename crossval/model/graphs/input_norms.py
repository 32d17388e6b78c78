"""What qwen3 and gemma3 have in common: a norm before each matrix, and one of every head of Q and K.

Each of the seven norms (``*_norm_in``) is a norm of what is normed already, with a weight of its own; a model has
all of them or none. Those before the output projections are BitNet's sub-norms and keep their tap names.
"""

from __future__ import annotations

from typing import Any

from crossval.model.graphs.decoder import HIDDEN, KEYS, MERGED, QUERIES, WIDE, Layer
from crossval.model.kinds import ACTIVATIONS, Multiply


def rotated_queries(layer: Layer, x: str) -> str:
    """Add the operations from a layer's input to its rotated queries."""
    h = layer.norm("attn_norm", x)
    q, k = layer.project(*(_normed(layer, f"attn_{name}_norm_in", h) for name in ("q", "k", "v")))
    q = layer.norm("q_norm", q, QUERIES, weight="attn_q_norm")
    k = layer.norm("k_norm", k, KEYS, weight="attn_k_norm")
    return layer.rotate(q, k)


def attention_output(layer: Layer, merged: str) -> str:
    """Add the output projection of the merged heads."""
    h = _normed(layer, "attn_sub_norm", merged, MERGED, weight="attn_output_norm_in")
    return layer.linear("attn_o_out", h, "attn_output", HIDDEN)


def feed_forward(layer: Layer, x: str) -> str:
    """Add the feed-forward block without its residual connection."""
    rows = layer.output_rows
    h = layer.norm("ffn_norm", x, **rows)
    for_gate = _normed(layer, "ffn_gate_norm_in", h, **rows)
    for_up = _normed(layer, "ffn_up_norm_in", h, **rows)
    gate = layer.linear("ffn_gate", for_gate, "ffn_gate", WIDE, **rows)
    up = layer.linear("ffn_up", for_up, "ffn_up", WIDE, **rows)
    h = layer.op("ffn_act", ACTIVATIONS[layer.config.activation], gate, axes=WIDE, **rows)
    h = layer.op("ffn_out", Multiply(), h, up, axes=WIDE, **rows)
    h = _normed(layer, "ffn_sub_norm", h, WIDE, weight="ffn_down_norm_in", **rows)
    return layer.linear("ffn_down", h, "ffn_down", HIDDEN, **rows)


def _normed(layer: Layer, name: str, x: str, *args: Any, **facts: Any) -> str:
    return layer.norm(name, x, *args, optional=True, **facts) if layer.config.input_norms else x
