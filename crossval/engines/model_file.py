"""The model file under test, fully checked, and what a receipt says about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py import overrides
from bitnet_py.config import ModelConfig
from bitnet_py.gguf import GGUFFile
from bitnet_py.projections import FLOATS
from bitnet_py.vocabulary import missing_pre
from bitnet_py.weights import Weights
from crossval.errors import BadInputError
from crossval.files import file_sha256
from crossval.model.config import may_pool
from crossval.terms import OUTPUT_IGNORED, SEPARATE_OUTPUT_NOTE, UNREAD

FLOAT_NOTE = (
    "the file stores its ternary matrices as {type}: bitnet.cpp and llama.cpp multiply those in floating point, "
    "without the int8 activations that the model defines, so their products differ (docs/types.md)"
)
ROW_GROUP = 4
"""Rows of a ternary matrix that bitnet.cpp multiplies together; it writes all 4 results of the last group."""
ROWS_NOTE = (
    "matrices of {rows} rows: not a multiple of 4, so bitnet.cpp writes past the end of the output buffer and "
    "may corrupt values or crash"
)

INPUT_NORM = "_norm_in.weight"
"""Ending of the norms before matrices."""
TOKENS_KEY = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class ModelFile:
    """A model file that was read completely; ``facts`` is the field ``model`` of a receipt."""

    path: Path
    config: ModelConfig
    facts: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """Those of the notes that a person should see even where no receipt is shown."""

    @property
    def input_norms(self) -> bool:
        """Whether every matrix norms its own input (``*_norm_in``)."""
        return bool(self.facts.get("input_norms", False))

    @property
    def pooling(self) -> str | None:
        """How the vectors of tokens become one of the text; None: the model's results are logits."""
        found: str | None = self.facts.get("pooling")
        return found

    def require_tokens(self, verb: str) -> None:
        """Refuse an embedding model, whose result is one vector of a text, for what needs tokens.

        Raises:
            BadInputError: it is one.
        """
        if self.pooling is not None:
            raise BadInputError(
                f"{self.path}: an embedding model (pooling {self.pooling}): its result is one vector of the "
                f"whole text, so it cannot {verb}; compare it with `crossval layers`"
            )

    @property
    def sha256(self) -> str:
        """Return the sha256 of the file, hexadecimal."""
        return str(self.facts["sha256"])


def check_model(path: str | Path) -> ModelFile:
    """Read a GGUF file completely: container, configuration, vocabulary, every tensor finite.

    Raises:
        ModelError: missing, malformed, unsupported, NaN and infinities among its weights, or tokens not UTF-8.
    """
    with GGUFFile.open(path) as gguf:
        weights = Weights.load(gguf)
        weights.check_finite()
        del weights
        return describe(gguf)


def describe(gguf: GGUFFile) -> ModelFile:
    """Return what a receipt says about a file, whose weights are not looked at.

    Raises:
        ModelError: an unsupported configuration, or tokens that are not UTF-8.
    """
    config, file = ModelConfig.from_gguf(gguf), gguf.path
    warnings = tuple(missing_pre(gguf.metadata))
    separate_output = "output.weight" in gguf.tensors
    projections = (
        gguf.tensors["blk.0.attn_q.weight"].type.name if "blk.0.attn_q.weight" in gguf.tensors else UNREAD
    )
    facts = {
        "sha256": file_sha256(file),
        "file_name": file.name,
        "size_bytes": file.stat().st_size,
        "architecture": config.arch,
        "quantization": projections,
        "separate_output": separate_output,
        "shape": {name: getattr(config, name) for name in _SHAPE},
        **form_facts(config, gguf.tensors),
    }
    ignored = separate_output and config.arch in OUTPUT_IGNORED
    notes = [*overrides.notes(), *warnings, *([SEPARATE_OUTPUT_NOTE] if ignored else [])]
    kv_rows = config.n_kv_heads * config.head_dim
    if kv_rows % ROW_GROUP:  # all other row counts are column counts elsewhere, so multiples of 128
        notes.append(ROWS_NOTE.format(rows=kv_rows))
    if projections in [ggml_type.name for ggml_type in FLOATS]:
        notes.append(FLOAT_NOTE.format(type=projections))
    tokenizer = _tokenizer_facts(gguf.metadata, config.vocab_size)
    return ModelFile(file, config, facts, tokenizer, tuple(notes), warnings)


def form_facts(config: ModelConfig, tensors: Collection[str]) -> dict[str, Any]:
    """Return what decides a model's graph beside architecture and shape, by its tensors; only what it has."""
    facts: dict[str, Any] = {}
    if any(name.endswith(INPUT_NORM) for name in tensors):
        facts["input_norms"] = True
    if config.pooling != "none" and may_pool(config.arch):
        facts["pooling"] = config.pooling
    return facts


@dataclass(frozen=True)
class VocabularyFile:
    """A file of which only the vocabulary was read; ``facts`` and ``tokenizer`` as in ``ModelFile``."""

    facts: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def check_vocabulary(path: str | Path) -> VocabularyFile:
    """Read a GGUF file's header, for what needs its vocabulary alone: dimensions that it does not state are 0.

    Raises:
        ModelError: missing or malformed, or without a vocabulary.
    """
    file = Path(path)
    with GGUFFile.open(file) as gguf:
        metadata = gguf.metadata
        arch = _text(metadata.get("general.architecture")) or "unknown"
        vocab_size = len(metadata.get(TOKENS_KEY, ()))
        tokenizer = _tokenizer_facts(metadata, vocab_size)
        warnings = tuple(missing_pre(metadata))
    shape: dict[str, Any] = {}
    for name, key in _SHAPE_KEYS.items():
        value = metadata.get(f"{arch}.{key}", 0)
        shape[name] = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    facts = {
        "sha256": file_sha256(file),
        "file_name": file.name,
        "size_bytes": file.stat().st_size,
        "architecture": arch,
        "quantization": UNREAD,
        "separate_output": False,
        "shape": {**shape, "vocab_size": vocab_size},
    }
    return VocabularyFile(facts, tokenizer, (*overrides.notes(), *warnings), warnings)


_SHAPE_KEYS = {
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "context_length": "context_length",
    "rope_base": "rope.freq_base",
    "rms_eps": "attention.layer_norm_rms_epsilon",
}
_SHAPE = (
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "dim",
    "hidden_dim",
    "vocab_size",
    "context_length",
    "rope_base",
    "rms_eps",
)


def _tokenizer_facts(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    return {
        "model": _text(metadata.get("tokenizer.ggml.model")),
        "pre": _text(metadata.get("tokenizer.ggml.pre")),
        "vocab_size": vocab_size,
        "digest": tokenizer_digest(metadata),
    }


def tokenizer_digest(metadata: Mapping[str, Any]) -> str:
    """Return the sha256 over all ``tokenizer.*`` metadata: one JSON line ``[key, value]`` per key, sorted."""
    digest = hashlib.sha256()
    for key in sorted(name for name in metadata if name.startswith("tokenizer.")):
        value = metadata[key]
        plain = value.tolist() if hasattr(value, "tolist") else value
        digest.update(json.dumps([key, plain], separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def missing_tokens(path: str | Path, wanted: tuple[str, ...]) -> list[str]:
    """Return those of ``wanted`` that are not tokens of the model's vocabulary."""
    if not wanted:
        return []
    with GGUFFile.open(path) as gguf:
        known = set(gguf.metadata.get(TOKENS_KEY, ()))
    return [token for token in wanted if token not in known]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
