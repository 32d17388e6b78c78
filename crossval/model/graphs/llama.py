"""Llama with BitLinear projections (Llama3-8B-1.58, Falcon3, Falcon-E): no sub-norms, a SiLU gate.

RoPE rotates adjacent pairs: converters permute the rows of Q and K, which Hugging Face stores for halves. Q, K, V
and the attention output may have biases.

Sources: arXiv 2302.13971, 2407.21783; bitnet.cpp ``build_llama``, in its main ``src/models/llama.cpp``. Taps keep
the names they have in BitNet's graph, where bitnet.cpp uses others for the same tensor.
"""

from __future__ import annotations

from crossval.model.config import SpecConfig
from crossval.model.graphs.decoder import HIDDEN, WIDE, Layer, decoder
from crossval.model.kinds import ACTIVATIONS, Add, Multiply
from crossval.model.op import Op


def operations(c: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    return decoder(c, _add_layer)


def _add_layer(layer: Layer, x: str) -> str:
    rows = layer.output_rows
    h = layer.attention(layer.norm("attn_norm", x))
    h = layer.linear("attn_o_out", h, "attn_output", HIDDEN)
    x = layer.op("ffn_inp", Add(), h, x, axes=HIDDEN, **rows)
    h = layer.norm("ffn_norm", x, **rows)
    gate = layer.linear("ffn_gate", h, "ffn_gate", WIDE, **rows)
    up = layer.linear("ffn_up", h, "ffn_up", WIDE, **rows)
    h = layer.op("ffn_act", ACTIVATIONS[layer.config.activation], gate, axes=WIDE, **rows)
    h = layer.op("ffn_out", Multiply(), h, up, axes=WIDE, **rows)
    h = layer.linear("ffn_down", h, "ffn_down", HIDDEN, **rows)
    return layer.op("l_out", Add(), h, x, axes=HIDDEN, **rows)
