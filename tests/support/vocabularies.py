"""Small vocabularies of every kind, as metadata and as files that hold nothing else."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf

from bitnet_py.arithmetic import GENERATIONS, Generation
from bitnet_py.pretokenizer import PRE_TYPES
from bitnet_py.special_tokens import TokenKind
from bitnet_py.synth_sentencepiece import build_sentencepiece
from bitnet_py.tokenizer import Tokenizer

_SMALL = Path(__file__).resolve().parents[1] / "data" / "tokenizer_goldens_small.json"
_GEMMA_LIKE = (
    ("<pad>", TokenKind.CONTROL, 0.0),
    ("\n\n", TokenKind.USER_DEFINED, 0.0),
    ("<start_of_turn>", TokenKind.CONTROL, 0.0),
    ("<end_of_turn>", TokenKind.NORMAL, 0.0),  # ends generation, and so is CONTROL, by its text
    ("<unused0>", TokenKind.UNUSED, 0.0),
    ("<mask>", TokenKind.USER_DEFINED, 0.0),
    ("of▁the", TokenKind.NORMAL, -2.5),  # a space inside: nothing can be split at spaces
    # Equal scores, where the left one comes first.
    *((text, TokenKind.NORMAL, -3.0) for text in ("12", "23", "123", "aa", "aaa", "==", "=-")),
)
_NO_ROLES: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
_ENDS = {"add_bos_token": True, "add_eos_token": True}
"""Both ends, in a file that names neither."""

KINDS = (
    *("llama-bpe", "default", "gpt-2", "falcon", "falcon3", "falcon_e", "qwen2", "starcoder"),
    *("no pre", "no roles", "sentencepiece", "gemma-like", "sentencepiece, both ends"),
)


@lru_cache(maxsize=1)
def _small() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_SMALL.read_text(encoding="utf-8"))["vocabulary"]
    return data


@lru_cache(maxsize=len(KINDS))
def metadata(kind: str) -> dict[str, Any]:
    """Return the ``tokenizer.ggml.*`` keys of a vocabulary."""
    if "sentencepiece" in kind or kind == "gemma-like":
        vocab = build_sentencepiece(914, 0, _GEMMA_LIKE) if kind == "gemma-like" else build_sentencepiece(900, 0)
        keys: dict[str, Any] = {
            "model": "llama",
            "tokens": list(vocab.tokens),
            "token_type": list(vocab.token_types),
            "scores": list(vocab.scores),
            "add_space_prefix": False if kind == "gemma-like" else None,
            **(_ENDS if kind.endswith("both ends") else {}),
        }
    else:
        small = _small()
        keys = {
            "model": "gpt2",
            "pre": {"no pre": None, "no roles": "gpt-2"}.get(kind, kind),
            **{name: small[name] for name in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id")},
            **({**_NO_ROLES, **_ENDS} if kind == "no roles" else {}),
        }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}


def tokenizer_of(kind: str, generation: Generation = "march") -> Tokenizer:
    """Return our tokenizer of a vocabulary."""
    return Tokenizer.from_gguf(SimpleNamespace(metadata=metadata(kind)), generation)


def known_to(kind: str) -> list[Generation]:
    """Return the generations of bitnet.cpp that load a vocabulary of this kind."""
    pre = metadata(kind).get("tokenizer.ggml.pre")
    return [one for one in GENERATIONS if pre is None or pre in PRE_TYPES[one]]


def write(path: Path, kind: str, **more: Any) -> Path:
    """Write a vocabulary as a GGUF file without tensors; ``more``: further ``tokenizer.ggml.*`` keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**metadata(kind), **{f"tokenizer.ggml.{name}": v for name, v in more.items()}}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
