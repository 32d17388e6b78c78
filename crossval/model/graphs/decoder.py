"""What the graphs of decoder-only transformers have in common: axes, embedding and head, attention.

A graph file lists the operations of one layer with a ``Layer``; ``decoder`` puts the rest around its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crossval.model.config import SpecConfig
from crossval.model.kinds import (
    Attend,
    AttentionScores,
    BitLinear,
    Embedding,
    Head,
    Kind,
    L2Norm,
    Pool,
    RmsNorm,
    Rope,
    Scale,
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
STATES = "final_states"
"""KV state of the whole model: the normed vectors of all tokens so far, which are pooled."""


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

    def norm(
        self, name: str, x: str, axes: tuple[Axis, ...] = HIDDEN, weight: str | None = None, **facts: Any
    ) -> str:
        """Add a norm of the last axis, whose weight is named like its tap unless another name is given."""
        weights = (f"{weight or name}.weight",)
        return self.op(name, RmsNorm(self.config.rms_eps), x, axes=axes, weights=weights, **facts)

    def linear(
        self, name: str, x: str, matrix: str, axes: tuple[Axis, ...], n_heads: int | None = None, **facts: Any
    ) -> str:
        """Add a projection with the bias that the model has for it."""
        endings = ("weight", "bias") if matrix in self.config.biases else ("weight",)
        weights = tuple(f"{matrix}.{ending}" for ending in endings)
        return self.op(name, BitLinear(n_heads), x, axes=axes, weights=weights, **facts)

    def attention(self, x: str) -> str:
        """Add the operations from a normed layer input to the merged heads."""
        q, k = self.project(x, x, x)
        q = self.rotate(q, k)
        return self.attend(q, 1.0 / math.sqrt(self.config.head_dim))

    def project(self, for_q: str, for_k: str, for_v: str) -> tuple[str, str]:
        """Add the three projections, each of its own input; return queries and keys. The values are cached."""
        q = self.linear("q", for_q, "attn_q", QUERIES, self.config.n_heads)
        k = self.linear("k", for_k, "attn_k", KEYS, self.config.n_kv_heads)
        self.linear("v", for_v, "attn_v", KEYS, self.config.n_kv_heads, appends_to=self.state("v_cache"))
        return q, k

    def rotate(self, q: str, k: str) -> str:
        """Add RoPE of queries and keys; return the queries. The keys are cached."""
        q = self._rotated("q_rope", q, QUERIES)
        self._rotated("k_rope", k, KEYS, appends_to=self.state("k_cache"))
        return q

    def attend(self, q: str, scale: float) -> str:
        """Add attention over the cached keys and values: scores, their softmax, the weighted sum."""
        kq = self.op("kq", AttentionScores(), q, self.state("k_cache"), axes=SCORES)
        weights = self.op("kq_soft_max", Softmax(scale), kq, "positions", axes=SCORES)
        return self.op("kqv_out", Attend(), weights, self.state("v_cache"), axes=MERGED)

    def state(self, name: str) -> str:
        """Return the full name of a KV state of this layer."""
        return f"blk.{self.index}.{name}"

    def _rotated(self, name: str, x: str, axes: tuple[Axis, ...], **facts: Any) -> str:
        c = self.config
        rope = Rope(c.rope_base, c.rope_pairing, c.rope_scale)
        factors = ("rope_freqs.weight",) if c.rope_factors else ()  # of the model, not of a layer
        self.ops.append(Op(name, self.index, rope, (x, "positions"), factors, axes, **facts))
        return self.ops[-1].output


def decoder(
    c: SpecConfig, add_layer: Callable[[Layer, str], str], embedding_scale: float | None = None
) -> tuple[Op, ...]:
    """List the operations of a model: embedding, layers, norm, head; with pooling the vector of the text.

    ``add_layer`` adds the operations of one layer whose input is the given tap, and returns its output.
    """
    embedding, head = "token_embd.weight", "token_embd.weight" if c.tied_head else "output.weight"
    ops = [Op("inp_embd", None, Embedding(), ("token_ids",), (embedding,), HIDDEN)]
    if embedding_scale is not None:
        ops.append(Op("inp_scaled", None, Scale(embedding_scale), (ops[0].output,), (), HIDDEN))
    x = ops[-1].output
    for index in range(c.n_layers):
        layer = Layer(c, index)
        x = add_layer(layer, x)
        ops += layer.ops
    return (*ops, *_ending(c, x, head))


def _ending(c: SpecConfig, x: str, head: str) -> list[Op]:
    """List what follows the layers: of every token where these are pooled, else of the last one."""
    pooled = c.pooling is not None
    last: dict[str, Any] = {"output_rows": True, "last_row_only": True}
    norm = Op(
        "result_norm", None, RmsNorm(c.rms_eps), (x,), ("output_norm.weight",), HIDDEN,
        appends_to=STATES if pooled else None, output_rows=True, last_row_only=not pooled,
    )  # fmt: skip
    ops = [norm, Op("result_output", None, Head(), (norm.output,), (head,), LOGITS, **last)]
    if c.pooling is not None:
        pool = Op("pooled", None, Pool(c.pooling), (STATES, "positions"), (), HIDDEN, **last)
        ops += [pool, Op("embedding", None, L2Norm(), (pool.output,), (), HIDDEN, **last)]
    return ops
