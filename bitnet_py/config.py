"""The shape and hyper-parameters of a BitNet model, read from GGUF metadata and validated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from bitnet_py.errors import ModelError, clip, model_error
from bitnet_py.gguf import GGUFFile
from bitnet_py.string_array import StringArray

Activation = Literal["relu_squared", "silu", "gelu"]
"""What the feed-forward block applies to its gate: ``max(x, 0)**2``, ``x / (1 + exp(-x))``, or GELU by its
approximation with ``tanh``."""
RopePairing = Literal["halves", "adjacent"]
"""Elements of a head that RoPE rotates together: i and i + head_dim / 2, or 2i and 2i + 1."""
Pooling = Literal["none", "mean", "cls", "last"]
"""How the vectors of the tokens become one of the text: not at all, their mean, that of the first, of the last."""
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "cls", "last")
"""In the order of the numbers of the key ``pooling_type``."""


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture implies, without a key in the file."""

    activation: Activation
    rope_pairing: RopePairing
    sub_norms: bool = True
    """Whether attention and feed-forward block norm what their last matrix multiplies."""
    scales: bool = False
    """Whether a matrix may have a factor of its own, ``.scale``."""
    biases: bool = False
    """Whether the matrices of attention may have biases."""
    rope_factors: bool = False
    """Whether RoPE may have ``rope_freqs``, a divisor of each pair's angle."""
    own_head: bool = False
    """Whether bitnet.cpp multiplies with an LM head of its own, a copy of the embedding if there is no other."""
    head_norms: bool = False
    """Whether every head of Q and K is normed before RoPE."""
    input_norms: bool = False
    """Whether every matrix may norm its own input, ``*_norm_in``; the sub-norms are two of these seven."""
    post_norms: bool = False
    """Whether the results of attention and of the feed-forward block are normed before they are added."""
    scales_embedding: bool = False
    """Whether the embedding is multiplied by the square root of its width."""
    scales_query: bool = False
    """Whether Q is scaled after RoPE, and the scores are not."""
    in_march: bool = True
    """Whether bitnet.cpp of March 2026 has it; of the others only its main has an arithmetic."""

    @property
    def graph(self) -> tuple[object, ...]:
        """Return what two architectures have in common that compute the same but for the activation."""
        norms = (self.sub_norms, self.head_norms, self.input_norms, self.post_norms)
        return (self.rope_pairing, *norms, self.scales_embedding, self.scales_query)


ARCHITECTURES = {
    "bitnet-b1.58": Architecture("relu_squared", "halves"),
    "bitnet-25": Architecture("relu_squared", "halves"),
    "bitnet": Architecture("silu", "halves", scales=True),
    "llama": Architecture(
        "silu", "adjacent", sub_norms=False, scales=True, biases=True, rope_factors=True, own_head=True
    ),
    "qwen3": Architecture("silu", "halves", own_head=True, head_norms=True, input_norms=True, in_march=False),
    "gemma3": Architecture(
        "gelu",
        "halves",
        own_head=True,
        head_norms=True,
        input_norms=True,
        post_norms=True,
        scales_embedding=True,
        scales_query=True,
        in_march=False,
    ),
}
"""Value of ``general.architecture`` -> what it implies. Others are rejected. Source: bitnet.cpp
llama.cpp, ``build_bitnet_158``, ``build_bitnet``, ``build_llama`` and ``llama_rope_type``; in its main
``src/models/llama.cpp``, which alone applies ``.scale`` to ``llama``, ``qwen3.cpp`` and ``gemma3.cpp``;
mainline llama.cpp has ``bitnet`` and ``llama``, and the same in them."""
I2_S_BLOCK = 128
"""Weights in one I2_S block: the row length of every matrix has to be a multiple of it."""

_LIMITS = {
    "block_count": 512,  # bitnet.cpp's own LLAMA_MAX_LAYERS
    "embedding_length": 1 << 17,
    "feed_forward_length": 1 << 20,
    "attention.head_count": 1 << 12,
    "attention.head_count_kv": 1 << 12,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "context_length": 1 << 24,
    "vocab_size": 1 << 22,
}
_LAYERS_OF_27B = 62
_NO_BLOCKS = "rows that are no whole blocks cannot be I2_S, in bitnet.cpp neither: give another model"
_CONVERT = "this engine cannot run the model: convert it again from its original weights"


@dataclass(frozen=True)
class ModelConfig:
    """Shape and hyper-parameters; the engine can run every instance."""

    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    context_length: int
    rope_base: float
    """Value of a float32."""
    rms_eps: float
    """Value of a float32."""
    rope_scale: float = 1.0
    """Times every angle of RoPE: 1 / the factor of linear scaling. Value of a float32."""
    pooling: Pooling = "none"
    """How bitnet.cpp makes one vector of a text, by the file."""

    @property
    def architecture(self) -> Architecture:
        """Return what the architecture's name implies."""
        return ARCHITECTURES[self.arch]

    @property
    def q_dim(self) -> int:
        """Return the width of Q: ``n_heads * head_dim``; ``dim`` unless the file gives another head size."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Return the width of K and V: ``n_kv_heads * head_dim``."""
        return self.n_kv_heads * self.head_dim

    @property
    def embedding_scale(self) -> float:
        """Return what the embedding is multiplied by, the value of a float32."""
        return float(np.sqrt(np.float32(self.dim))) if self.architecture.scales_embedding else 1.0

    @property
    def query_scale(self) -> float | None:
        """Return what Q is multiplied by after RoPE, the value of a float32; None: the scores are scaled instead.

        Source: bitnet.cpp's main, ``gemma3.cpp``, which tells the 27B model by its layers.
        """
        if not self.architecture.scales_query:
            return None
        width = self.dim // self.n_heads if self.n_layers == _LAYERS_OF_27B else self.head_dim
        return float(np.float32(1.0) / np.sqrt(np.float32(width)))

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> ModelConfig:
        """Read and validate the configuration.

        Keys and defaults: bitnet.cpp llama.cpp ``llm_load_hparams`` (head_count_kv = head_count,
        rope.freq_base = 10000, key_length = value_length = embedding_length / head_count).

        Raises:
            ModelError: another architecture, a missing key, or a value the engine cannot run.
        """
        return _Reader(gguf).config()


class _Reader:
    """Typed, checked access to ``{arch}.*`` keys."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.path = gguf.path
        self.metadata = gguf.metadata
        arch = gguf.metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise self.error(
                "general.architecture",
                " or ".join(ARCHITECTURES),
                "no such key" if arch is None else clip(str(arch)),
                "give a BitNet model of one of these",
            )
        self.arch: str = arch

    def error(self, key: str, expected: object, found: object, remedy: str = _CONVERT) -> ModelError:
        return model_error(self.path, f"key {key}", expected=expected, found=found, remedy=remedy)

    def raw(self, key: str) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}")
        # llama.cpp allows one value per layer for some keys; equal values mean the same as one.
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            return value[0].item()
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        name = f"{self.arch}.{key}"
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.error(name, "the key", "no such key")
            return default
        limit = _LIMITS.get(key, 1 << 31)
        if type(value) is not int or not 1 <= value <= limit:
            raise self.error(name, f"an integer from 1 to {limit}", clip(str(value)))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return the value of a float32."""
        name = f"{self.arch}.{key}"
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.error(name, "the key", "no such key")
            return default
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.error(name, "a number", clip(str(value)))
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
        if not (math.isfinite(number) and number > 0):
            raise self.error(name, "a finite number above 0", value)
        return number

    def require(
        self, key: str, expected: Sequence[object], what: str | None = None, remedy: str = _CONVERT
    ) -> None:
        """Reject a key that is present with a value other than those expected."""
        value = self.raw(key)
        if value is not None and (isinstance(value, np.ndarray) or value not in expected):
            raise self.error(f"{self.arch}.{key}", what or expected[0], clip(str(value)), remedy)

    def vocab_size(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        n_tokens = len(tokens) if isinstance(tokens, StringArray) else None
        vocab_size = self.integer("vocab_size", n_tokens)
        if n_tokens is not None and n_tokens != vocab_size:
            raise self.error(f"{self.arch}.vocab_size", f"{n_tokens}, the tokens of the vocabulary", vocab_size)
        return vocab_size

    def head_dim(self, dim: int, n_heads: int) -> int:
        """Return the width of one head, the same for keys and values."""
        has_own = self.raw("attention.key_length") is not None
        if dim % n_heads and not has_own:
            raise self.error(f"{self.arch}.embedding_length", f"a multiple of {n_heads} heads", dim)
        head_dim = self.integer("attention.key_length", dim // n_heads)
        value_dim = self.integer("attention.value_length", dim // n_heads)
        if value_dim != head_dim:
            raise self.error(f"{self.arch}.attention.value_length", f"{head_dim}, the head size", value_dim)
        if head_dim % 2:
            key = "key_length" if has_own else "head_count"
            expected = "an even head size (RoPE rotates pairs)"
            raise self.error(f"{self.arch}.attention.{key}", expected, head_dim)
        return head_dim

    def config(self) -> ModelConfig:
        n_heads = self.integer("attention.head_count")
        n_kv_heads = self.integer("attention.head_count_kv", n_heads)
        dim = self.integer("embedding_length")
        hidden_dim = self.integer("feed_forward_length")
        head_dim = self.head_dim(dim, n_heads)
        if n_heads % n_kv_heads:
            raise self.error(f"{self.arch}.attention.head_count_kv", f"a divisor of {n_heads} heads", n_kv_heads)
        for key, width in (
            ("embedding_length", dim),
            ("attention.key_length", n_heads * head_dim),
            ("feed_forward_length", hidden_dim),
        ):
            if width % I2_S_BLOCK:
                left = f"{width} ({width} % {I2_S_BLOCK} = {width % I2_S_BLOCK})"
                raise self.error(
                    f"{self.arch}.{key}", f"a multiple of {I2_S_BLOCK} (I2_S blocks)", left, _NO_BLOCKS
                )
        self.require("rope.dimension_count", (head_dim,), f"{head_dim}, the head size")
        self.refuse_unsupported()
        return ModelConfig(
            arch=self.arch,
            n_layers=self.integer("block_count"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            dim=dim,
            hidden_dim=hidden_dim,
            vocab_size=self.vocab_size(),
            context_length=self.integer("context_length"),
            rope_base=self.number("rope.freq_base", 10000.0),
            rms_eps=self.number("attention.layer_norm_rms_epsilon"),
            rope_scale=self.rope_scale(),
            pooling=self.pooling(),
        )

    def pooling(self) -> Pooling:
        key, value = f"{self.arch}.pooling_type", self.raw("pooling_type")
        if value is None:
            return "none"
        if type(value) is not int or not 0 <= value < len(POOLINGS):
            names = ", ".join(f"{number} ({name})" for number, name in enumerate(POOLINGS))
            raise self.error(key, names, clip(str(value)), "this pooling is not supported")
        return POOLINGS[value]

    def rope_scale(self) -> float:
        """Return what linear scaling multiplies every angle by; 0 as a factor is llama.cpp's "not set"."""
        key = "rope.scaling.factor" if self.raw("rope.scaling.factor") is not None else "rope.scale_linear"
        value = self.raw(key)
        if type(value) in (int, float) and value == 0:
            return 1.0
        factor = self.number(key, 1.0)
        if not 1e-30 <= factor <= 1e30:
            raise self.error(f"{self.arch}.{key}", "a factor from 1e-30 to 1e30", factor)
        return 1.0 if self.raw("rope.scaling.type") == "none" else float(np.float32(1.0) / np.float32(factor))

    def refuse_unsupported(self) -> None:
        """Reject features that change the result and that the engine does not support."""
        self.require(
            "rope.scaling.type", ("none", "linear"), "none or linear (no other RoPE scaling is supported)"
        )
        self.require("rope.scaling.attn_factor", (1.0,))
        for key in ("expert_count", "expert_used_count"):
            self.require(key, (0,), "0 (mixtures of experts are not supported)", "give a dense BitNet model")
        self.require("attention.causal", (True,), "true (only causal attention is supported)")
        if not ARCHITECTURES[self.arch].in_march:
            self.require("attention.sliding_window", (0,), "0 (sliding windows are not supported)")
            self.require("final_logit_softcapping", (0.0,), "0 (capped logits are not supported)")
