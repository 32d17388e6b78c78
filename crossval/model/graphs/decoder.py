"""What the graphs of decoder-only transformers have in common: axes, embedding and head, attention.

A graph file lists the operations of one layer with a ``Layer``; ``decoder`` puts the rest around its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crossval.model.config import SpecConfig
from crossval.model.kinds import Attend, AttentionScores, BitLinear, Embedding, Head, Kind, RmsNorm, Rope, Softmax
from crossval.model.op import Axis, Op

HIDDEN: tuple[Axis, ...] = ("n_tokens", "dim")
WIDE: tuple[Axis, ...] = ("n_tokens", "hidden_dim")
QUERIES: tuple[Axis, ...] = ("n_tokens", "n_heads", "head_dim")
KEYS: tuple[Axis, ...] = ("n_tokens", "n_kv_heads", "head_dim")
SCORES: tuple[Axis, ...] = ("n_heads", "n_tokens", "n_kv")
MERGED: tuple[Axis, ...] = ("n_tokens", "q_dim")
LOGITS: tuple[Axis, ...] = ("n_tokens", "vocab_size")


@dataclass
class Layer:
    """The operations of one transformer layer, in the order in which they are added."""

    config: SpecConfig
    index: int
    ops: list[Op] = field(default_factory=list)

    @property
    def output_rows(self) -> dict[str, Any]:
        """Facts of what follows attention: after the last layer's, no token attends to another any more."""
        return {"output_rows": self.index == self.config.n_layers - 1}

    def op(
        self,
        name: str,
        kind: Kind,
        *inputs: str,
        axes: tuple[Axis, ...],
        weights: tuple[str, ...] = (),
        **facts: Any,
    ) -> str:
        """Add an operation, its weights named without the layer; return its tap."""
        named = tuple(f"blk.{self.index}.{weight}" for weight in weights)
        self.ops.append(Op(name, self.index, kind, inputs, named, axes, **facts))
        return self.ops[-1].output

    def norm(self, name: str, x: str, axes: tuple[Axis, ...] = HIDDEN, **facts: Any) -> str:
        """Add a norm, whose weight is named like its tap."""
        return self.op(name, RmsNorm(self.config.rms_eps), x, axes=axes, weights=(f"{name}.weight",), **facts)

    def linear(
        self, name: str, x: str, matrix: str, axes: tuple[Axis, ...], n_heads: int | None = None, **facts: Any
    ) -> str:
        """Add a projection with the bias that the model has for it."""
        endings = ("weight", "bias") if matrix in self.config.biases else ("weight",)
        weights = tuple(f"{matrix}.{ending}" for ending in endings)
        return self.op(name, BitLinear(n_heads), x, axes=axes, weights=weights, **facts)

    def attention(self, x: str) -> str:
        """Add the operations from a normed layer input to the merged heads."""
        c = self.config
        rope = Rope(c.rope_base, c.rope_pairing, c.rope_scale)
        q = self.linear("q", x, "attn_q", QUERIES, c.n_heads)
        k = self.linear("k", x, "attn_k", KEYS, c.n_kv_heads)
        k_cache, v_cache = f"blk.{self.index}.k_cache", f"blk.{self.index}.v_cache"
        self.linear("v", x, "attn_v", KEYS, c.n_kv_heads, appends_to=v_cache)
        q = self._rotate("q_rope", rope, q, QUERIES)
        self._rotate("k_rope", rope, k, KEYS, appends_to=k_cache)
        kq = self.op("kq", AttentionScores(), q, k_cache, axes=SCORES)
        weights = self.op("kq_soft_max", Softmax(1.0 / math.sqrt(c.head_dim)), kq, "positions", axes=SCORES)
        return self.op("kqv_out", Attend(), weights, v_cache, axes=MERGED)

    def _rotate(self, name: str, rope: Rope, x: str, axes: tuple[Axis, ...], **facts: Any) -> str:
        factors = ("rope_freqs.weight",) if self.config.rope_factors else ()  # of the model, not of a layer
        self.ops.append(Op(name, self.index, rope, (x, "positions"), factors, axes, **facts))
        return self.ops[-1].output


def decoder(c: SpecConfig, add_layer: Callable[[Layer, str], str]) -> tuple[Op, ...]:
    """List the operations of a model: embedding, layers, norm, head.

    ``add_layer`` adds the operations of one layer whose input is the given tap, and returns its output.
    """
    embedding, head = "token_embd.weight", "token_embd.weight" if c.tied_head else "output.weight"
    ops = [Op("inp_embd", None, Embedding(), ("token_ids",), (embedding,), HIDDEN)]
    x = ops[0].output
    for index in range(c.n_layers):
        layer = Layer(c, index)
        x = add_layer(layer, x)
        ops += layer.ops
    norm = Op(
        "result_norm", None, RmsNorm(c.rms_eps), (x,), ("output_norm.weight",), HIDDEN,
        output_rows=True, last_row_only=True,
    )  # fmt: skip
    logits = Op(
        "result_output", None, Head(), (norm.output,), (head,), LOGITS, output_rows=True, last_row_only=True
    )
    return (*ops, norm, logits)
