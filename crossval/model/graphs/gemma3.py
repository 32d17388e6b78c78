"""Gemma 3 with BitLinear projections (BitNet-embedding-270M): as Qwen3, with norms after each block, too.

The embedding is scaled by the root of its width, queries are scaled in place of scores, the gate is GELU. Weights
of norms are in the file with the 1 that Gemma adds. Every layer attends to all tokens: files with a sliding window
are refused.

Sources: arXiv 2503.19786; bitnet.cpp's main ``src/models/gemma3.cpp``.
"""

from __future__ import annotations

import math

from crossval.model.config import SpecConfig
from crossval.model.graphs.decoder import HIDDEN, QUERIES, Layer, decoder
from crossval.model.graphs.input_norms import attention_output, feed_forward, rotated_queries
from crossval.model.kinds import Add, Scale
from crossval.model.op import Op

LAYERS_OF_27B = 62
"""Of the one model whose queries are scaled by another width than that of its heads."""


def operations(c: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    return decoder(c, _add_layer, embedding_scale=math.sqrt(c.dim))


def query_scale(c: SpecConfig) -> float:
    """Return what queries are multiplied by."""
    return 1.0 / math.sqrt(c.dim // c.n_heads if c.n_layers == LAYERS_OF_27B else c.head_dim)


def _add_layer(layer: Layer, x: str) -> str:
    rows = layer.output_rows
    q = layer.op("q_scaled", Scale(query_scale(layer.config)), rotated_queries(layer, x), axes=QUERIES)
    h = attention_output(layer, layer.attend(q, 1.0))
    h = layer.norm("attn_post_norm", h, weight="post_attention_norm", **rows)
    x = layer.op("ffn_inp", Add(), h, x, axes=HIDDEN, **rows)
    h = layer.norm("ffn_post_norm", feed_forward(layer, x), weight="post_ffw_norm", **rows)
    return layer.op("l_out", Add(), h, x, axes=HIDDEN, **rows)
