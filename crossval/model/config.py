"""Shape and hyper-parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossval.model.kinds import Pooling, RopePairing

Activation = Literal["relu_squared", "silu", "gelu"]
"""Key of ``crossval.model.kinds.ACTIVATIONS``."""
IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "bitnet-b1.58": {"activation": "relu_squared"},
    "bitnet-25": {"activation": "relu_squared"},
    "bitnet": {"activation": "silu"},
    "llama": {"activation": "silu", "rope_pairing": "adjacent"},
    "qwen3": {"activation": "silu"},
    "gemma3": {"activation": "gelu"},
}
"""``general.architecture`` of a model file -> fields of ``SpecConfig`` that its name implies; no key says them."""
MAY_HAVE: Mapping[str, frozenset[str]] = {
    "bitnet": frozenset({"scale"}),
    "llama": frozenset({"scale", "bias", "rope_freqs"}),
    "qwen3": frozenset({"input_norms", "pooling"}),
    "gemma3": frozenset({"input_norms", "pooling"}),
}
"""What a model of an architecture may have beside its matrices: another factor of each, biases of those of
attention, divisors of RoPE's angles, a norm before each matrix (``*_norm_in``), one vector of the text as its
result."""


def may_pool(architecture: str) -> bool:
    """Return whether a model of an architecture may have one vector of a text as its result."""
    return "pooling" in MAY_HAVE.get(architecture, ())


@dataclass(frozen=True)
class SpecConfig:
    """Shape and hyper-parameters the graph depends on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    context_length: int
    rope_base: float
    rms_eps: float
    attn_sub_norm: bool = True
    """Whether the attention output is normed before its projection."""
    ffn_sub_norm: bool = True
    """Whether the gated activation is normed before the down projection."""
    tied_head: bool = True
    """Whether the LM head uses ``token_embd.weight``; otherwise it uses ``output.weight``."""
    head_type: str = "F16"
    """ggml's name of the type of that table, by which engines round what they multiply with it."""
    architecture: str = "bitnet-b1.58"
    """Key of ``crossval.model.graphs.GRAPHS``."""
    activation: Activation = "relu_squared"
    rope_pairing: RopePairing = "halves"
    rope_scale: float = 1.0
    """Times every position: 1 / the factor of linear RoPE scaling."""
    rope_factors: bool = False
    """Whether ``rope_freqs.weight`` divides the angles of RoPE."""
    biases: frozenset[str] = frozenset()
    """Matrices of every layer that have a bias, without layer and ending: ``attn_q``."""
    input_norms: bool = False
    """Whether every matrix norms its own input, by ``*_norm_in``; two of these seven are the sub-norms."""
    pooling: Pooling | None = None
    """How the vectors of tokens become one of the text; None: the model's results are logits."""
    follows: str | None = None
    """Whose graph this is, where it is not the model's (``crossval.model.reference_graph``)."""

    def may_have(self, what: str) -> bool:
        """Return whether a model of this architecture may have something of ``MAY_HAVE``."""
        return what in MAY_HAVE.get(self.architecture, ())
