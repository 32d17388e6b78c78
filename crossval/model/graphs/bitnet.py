"""BitNet b1.58: BitLinear projections, sub-norms before the output projections, a gated feed-forward block.

The gate is squared ReLU in 2B-4T and SiLU in the models of architecture ``bitnet``; all else is the same.

Sources: arXiv 2504.12285 and 2402.17764; tap names follow the graph callbacks of bitnet.cpp
(``llm_build_bitnet_158``).
"""

from __future__ import annotations

from crossval.model.config import SpecConfig
from crossval.model.graphs.decoder import HIDDEN, MERGED, WIDE, Layer, decoder
from crossval.model.kinds import ACTIVATIONS, Add, Multiply
from crossval.model.op import Op


def operations(c: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    return decoder(c, _add_layer)


def _add_layer(layer: Layer, x: str) -> str:
    c, rows = layer.config, layer.output_rows
    h = layer.attention(layer.norm("attn_norm", x))
    if c.attn_sub_norm:
        h = layer.norm("attn_sub_norm", h, MERGED, optional=True)
    h = layer.linear("attn_o_out", h, "attn_output", HIDDEN)
    x = layer.op("ffn_inp", Add(), h, x, axes=HIDDEN, **rows)
    h = layer.norm("ffn_norm", x, **rows)
    gate = layer.linear("ffn_gate", h, "ffn_gate", WIDE, **rows)
    up = layer.linear("ffn_up", h, "ffn_up", WIDE, **rows)
    h = layer.op("ffn_act", ACTIVATIONS[c.activation], gate, axes=WIDE, **rows)
    h = layer.op("ffn_out", Multiply(), h, up, axes=WIDE, **rows)
    if c.ffn_sub_norm:
        h = layer.norm("ffn_sub_norm", h, WIDE, optional=True, **rows)
    h = layer.linear("ffn_down", h, "ffn_down", HIDDEN, **rows)
    return layer.op("l_out", Add(), h, x, axes=HIDDEN, **rows)
