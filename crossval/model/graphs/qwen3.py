"""Qwen3 with BitLinear projections (BitNet-embedding-0.6B): norms of heads, a norm before each matrix.

Sources: arXiv 2505.09388; bitnet.cpp's main ``src/models/qwen3.cpp``. Taps keep the names they have in BitNet's
graph, where bitnet.cpp uses others for the same tensor.
"""

from __future__ import annotations

import math

from crossval.model.config import SpecConfig
from crossval.model.graphs.decoder import HIDDEN, Layer, decoder
from crossval.model.graphs.input_norms import attention_output, feed_forward, rotated_queries
from crossval.model.kinds import Add
from crossval.model.op import Op


def operations(c: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    return decoder(c, _add_layer)


def _add_layer(layer: Layer, x: str) -> str:
    rows = layer.output_rows
    h = layer.attend(rotated_queries(layer, x), 1.0 / math.sqrt(layer.config.head_dim))
    h = attention_output(layer, h)
    x = layer.op("ffn_inp", Add(), h, x, axes=HIDDEN, **rows)
    return layer.op("l_out", Add(), feed_forward(layer, x), x, axes=HIDDEN, **rows)
