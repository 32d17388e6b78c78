"""What a synthetic model can be: its shape, its types, the tensors that it may have or lack."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnet_py.config import ARCHITECTURES, POOLINGS
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType
from bitnet_py.projections import PROJECTIONS, block_of
from bitnet_py.synth_vocab import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE
from bitnet_py.tables import TABLES

_PRE = {"qwen3": "qwen2"}
NORMS = {"f32": GGMLType.F32, "f16": GGMLType.F16}
"""Name on the command line -> type of the weights of norms."""


@dataclass(frozen=True)
class SynthConfig:
    """What to write; names as in ``ModelConfig``."""

    n_layers: int = 4
    dim: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 768
    vocab_size: int = 512
    context_length: int = 2048
    rope_base: float = 500000.0
    rms_eps: float = 1e-5
    seed: int = 0
    arch: str = "bitnet-b1.58"
    projections: str = "i2_s"
    """Type of the ternary matrices: ``i2_s``, which bitnet.cpp reads, ``tq1_0`` or ``tq2_0``, which llama.cpp
    does (as ``--arch bitnet``), or ``f16`` or ``f32``, which converters write on the way."""
    embedding: str = "f16"
    """Type of the embedding, which is also the LM head unless there is another."""
    head: str | None = None
    """Type of a separate LM head; None: the embedding's."""
    norms: str = "f32"
    """Type of the weights of norms, ``f32`` or ``f16``."""
    pre: str | None = None
    """Value of ``tokenizer.ggml.pre``; ``none`` omits the key, as the official 2B-4T file does. None: that of
    the architecture's models. ``sentencepiece``: that tokenizer, as 1bitLLM's models have it."""
    untied_head: bool = False
    """Write a separate ``output.weight``; bitnet.cpp uses it in ``llama`` only, others load and ignore it."""
    sub_norms: bool = True
    """False omits ``attn_sub_norm`` and ``ffn_sub_norm``, which bitnet.cpp rejects, or the ``*_norm_in`` of
    ``qwen3`` and ``gemma3``, which it does not; ``llama`` has none."""
    head_dim: int | None = None
    """Width of one head; None: ``dim / n_heads``, the only one that bitnet.cpp loads for ``bitnet``."""
    biases: bool = False
    """Write biases of Q, K, V and the attention output."""
    rope_freqs: bool = False
    """Write ``rope_freqs.weight``, divisors of the angles of RoPE."""
    scales: bool = False
    """Write a ``.scale`` for every matrix."""
    rope_scaling: float = 1.0
    """Factor of linear RoPE scaling; 1 omits the keys."""
    pooling: str | None = None
    """How the vectors of tokens become one of the text: one of ``POOLINGS``; None omits the key."""

    @property
    def projection_type(self) -> GGMLType:
        """Return the type of the ternary matrices."""
        return PROJECTIONS[self.projections]

    @property
    def head_size(self) -> int:
        """Return the width of one head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def sentencepiece(self) -> bool:
        """Return whether the tokenizer is SentencePiece, not byte-level BPE."""
        return self.arch == "gemma3" or self.pre == "sentencepiece"

    @property
    def pre_type(self) -> str:
        """Return the value of ``tokenizer.ggml.pre``."""
        if self.sentencepiece:
            return "default"
        return _PRE.get(self.arch, "llama-bpe") if self.pre is None else self.pre

    def check(self) -> None:
        """Raise ``ModelError`` for a shape that no engine could run."""
        for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ModelError(f"synthetic model: expected {name} of at least 1, found {getattr(self, name)}")
        if self.projections not in PROJECTIONS:
            names = " or ".join(PROJECTIONS)
            raise ModelError(f"synthetic model: expected projections {names}, found {self.projections!r}")
        for kind in (self.embedding, *([] if self.head is None else [self.head])):
            if kind not in TABLES:
                raise ModelError(f"synthetic model: expected embedding {' or '.join(TABLES)}, found {kind!r}")
            elements = BLOCK_LAYOUT[TABLES[kind]][0]
            if self.dim % elements:
                raise ModelError(
                    f"synthetic model: expected dim to be a multiple of {elements} for {kind}, found {self.dim}"
                )
        if self.norms not in NORMS:
            raise ModelError(f"synthetic model: expected norms {' or '.join(NORMS)}, found {self.norms!r}")
        block = block_of(self.projection_type)
        for name, value, divisor in (
            ("dim", self.dim, block),
            ("hidden_dim", self.hidden_dim, block),
            *([("dim", self.dim, 2 * self.n_heads)] if self.head_dim is None else []),
            ("head_dim", self.head_size, 2),
            ("n_heads * head_dim", self.n_heads * self.head_size, block),
            ("n_heads", self.n_heads, self.n_kv_heads),
        ):
            if value % divisor:
                raise ModelError(f"synthetic model: expected {name} to be a multiple of {divisor}, found {value}")
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            limits = f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
            raise ModelError(f"synthetic model: expected vocab_size from {limits}, found {self.vocab_size}")
        if self.arch not in ARCHITECTURES:
            raise ModelError(f"synthetic model: expected arch {' or '.join(ARCHITECTURES)}, found {self.arch!r}")
        known = ARCHITECTURES[self.arch]
        for name, has in (("biases", known.biases), ("rope_freqs", known.rope_factors), ("scales", known.scales)):
            if getattr(self, name) and not has:
                raise ModelError(f"synthetic model: expected no {name} in {self.arch}, found some")
        if self.pooling is not None and self.pooling not in POOLINGS:
            names = " or ".join(POOLINGS)
            raise ModelError(f"synthetic model: expected pooling {names}, found {self.pooling!r}")
        for name in ("rope_base", "rms_eps", "rope_scaling"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ModelError(f"synthetic model: expected {name} above 0, found {getattr(self, name)}")


# fmt: off
PRESETS = {
    "tiny": SynthConfig(),
    "small": SynthConfig(n_layers=5, dim=384, n_heads=6, n_kv_heads=2, hidden_dim=1024, vocab_size=1024),
    "odd": SynthConfig(n_layers=7, dim=640, n_heads=5, n_kv_heads=1, hidden_dim=1792, vocab_size=777),
    "2b-4t": SynthConfig(
        n_layers=30, dim=2560, n_heads=20, n_kv_heads=5, hidden_dim=6912, vocab_size=128256, context_length=4096
    ),
    "large": SynthConfig(
        n_layers=24, dim=1536, n_heads=16, n_kv_heads=16, hidden_dim=4096, vocab_size=32002, rope_base=10000.0,
        arch="bitnet", pre="sentencepiece",
    ),
    "falcon3-1b": SynthConfig(
        n_layers=18, dim=2048, n_heads=8, n_kv_heads=4, hidden_dim=8192, vocab_size=131072, context_length=8192,
        rope_base=1000042.0, rms_eps=1e-6, arch="llama", head_dim=256, untied_head=True,
    ),
    "embedding-0.6b": SynthConfig(
        n_layers=28, dim=1024, n_heads=16, n_kv_heads=8, hidden_dim=3072, vocab_size=151936, context_length=32768,
        rope_base=1000000.0, rms_eps=1e-6, arch="qwen3", head_dim=128, norms="f16", pooling="mean",
    ),
    "embedding-270m": SynthConfig(
        n_layers=18, dim=640, n_heads=4, n_kv_heads=1, hidden_dim=2048, vocab_size=262144, context_length=32768,
        rope_base=10000.0, rms_eps=1e-6, arch="gemma3", head_dim=256, norms="f16", pooling="mean",
    ),
}
# fmt: on
