"""Compare the header of a model file with ``config.json`` and the tokenizer's files of its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_py.checkpoint_config import Header
from bitnet_py.checkpoint_tokenizer import TokenizerKeys, is_padding, read_chat_template, read_tokenizer
from bitnet_py.config import ARCHITECTURES
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.string_array import StringArray
from crossval.weights.rows import KeyRow

DEFAULTS: Mapping[str, float] = {"rope.freq_base": 10000.0, "rope.scaling.factor": 1.0}
"""What llama.cpp takes for a key that is missing (``llm_load_hparams``)."""
SPM_IDS: Mapping[str, int] = {"bos": 1, "eos": 2}
"""What it takes for the ids of a SentencePiece tokenizer."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def compare_config(metadata: Mapping[str, Any], header: Header) -> list[KeyRow]:
    """Return a row per hyper-parameter: what ``config.json`` says, and what an engine takes from the file."""
    arch = str(metadata.get("general.architecture"))
    rows = [_architecture(arch, header)]
    derived = {
        "attention.head_count_kv": metadata.get(f"{arch}.attention.head_count"),
        "vocab_size": _length(metadata.get("tokenizer.ggml.tokens")),
        "rope.dimension_count": _head_dim(metadata, arch),
        "attention.key_length": _head_dim(metadata, arch),
        "attention.value_length": _head_dim(metadata, arch),
    }
    expected = {**header.keys(), "rope.scaling.factor": header.rope_factor}
    for key, right in expected.items():
        name = f"{arch}.{key}"
        given = _number(metadata.get(name))
        if key == "rope.scaling.factor" and given == 0:
            given = 1.0  # llama.cpp: not set
        found = given if given is not None else DEFAULTS.get(key, derived.get(key))
        row = KeyRow(name, right, float(found) if isinstance(right, float) and found is not None else found)
        if given is None and found != right:
            row = replace(
                row, detail="the key is missing" if found is None else "the key is missing: a default is taken"
            )
        rows.append(row)
    return rows


def compare_tokenizer(gguf: GGUFFile, folder: Path, vocab_size: int) -> tuple[list[KeyRow], list[str]]:
    """Return a row per fact of the tokenizer, and why any could not be compared."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [], ["the checkpoint's folder has no tokenizer"]
    try:
        right = read_tokenizer(folder, vocab_size)
    except BitnetError as error:
        return [], [f"tokenizer: {error}"]
    try:
        return list(_tokenizer_rows(gguf.metadata, right)), []
    except BitnetError as error:  # strings of the file are decoded on access
        return [], [f"tokenizer of the file: {error}"]


def compare_template(gguf: GGUFFile, folder: Path) -> KeyRow:
    """Return the row of the chat template; a difference changes no engine's results, so it is a note."""
    right = read_chat_template(folder)
    found = gguf.metadata.get("tokenizer.chat_template")
    found = found if isinstance(found, str) else None
    return KeyRow("tokenizer.chat_template", _fingerprint(right), _fingerprint(found), level="note")


def _architecture(arch: str, header: Header) -> KeyRow:
    """Return the row of the architecture: right is any name that implies the model's activation and pairing."""
    wanted, implied = ARCHITECTURES.get(header.arch), ARCHITECTURES.get(arch)
    same = (
        wanted is not None
        and implied is not None
        and (wanted.activation, wanted.rope_pairing) == (implied.activation, implied.rope_pairing)
    )
    if same:
        return KeyRow("general.architecture", arch, arch)
    detail = None
    if implied is not None and implied.activation != header.activation:
        detail = f"{arch} means activation {implied.activation}, config.json says {header.activation}"
    elif implied is not None:
        detail = f"{arch} means RoPE pairs {implied.rope_pairing}"
    return KeyRow("general.architecture", header.arch, arch, detail=detail)


def _tokenizer_rows(metadata: Mapping[str, Any], right: TokenizerKeys) -> Iterator[KeyRow]:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    yield KeyRow("tokenizer.ggml.model", right.model, kind if isinstance(kind, str) else None)
    n_real = next((i for i, token in enumerate(right.tokens) if is_padding(token)), len(right.tokens))
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    yield _list_row("tokenizer.ggml.tokens", right.tokens[:n_real], tokens[:n_real])
    if right.model == "gpt2":
        row = KeyRow("tokenizer.ggml.pre", right.pre, pre if isinstance(pre, str) else None)
        yield row if pre else replace(row, detail="the key is missing: text is split in the default way")
        yield _list_row("tokenizer.ggml.merges", right.merges, _strings(metadata, "tokenizer.ggml.merges"))
    else:
        scores = [str(np.float32(score)) for score in metadata.get("tokenizer.ggml.scores", ())]
        exact = [str(np.float32(score)) for score in right.scores]
        yield _list_row("tokenizer.ggml.scores", exact[:n_real], scores[:n_real])
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        yield KeyRow("tokenizer.ggml.add_space_prefix", right.add_space_prefix, prefix is True)
    for name, token_id in (("bos", right.bos_id), ("eos", right.eos_id)):
        if token_id is not None:
            key = f"tokenizer.ggml.{name}_token_id"
            yield KeyRow(key, token_id, _number(metadata.get(key, SPM_IDS[name] if kind == "llama" else None)))
    for name, adds in (("bos", right.add_bos), ("eos", right.add_eos)):
        key = f"tokenizer.ggml.add_{name}_token"
        given = metadata.get(key)
        default = name == "bos" and (kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3"))
        yield KeyRow(key, adds, given if isinstance(given, bool) else default)


def _list_row(key: str, right: Sequence[str], found: Sequence[str]) -> KeyRow:
    """Return the row of a list, which a receipt states as its length and digest."""
    row = KeyRow(key, _list_fingerprint(right), _list_fingerprint(found))
    first = next((i for i, (one, other) in enumerate(zip(right, found, strict=False)) if one != other), None)
    if first is not None:
        row = replace(row, detail=f"first different: {first}, {right[first]!r} and {found[first]!r}"[:200])
    return row


def _list_fingerprint(items: Sequence[str]) -> str:
    digest = hashlib.sha256("".join(json.dumps(item) + "\n" for item in items).encode())
    return f"{len(items)}, sha256 {digest.hexdigest()[:16]}"


def _fingerprint(text: str | None) -> str | None:
    if text is None:
        return None
    return (
        f"{len(text)} characters, sha256 {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    )


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    return list(value) if isinstance(value, StringArray) else []


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, StringArray) else None


def _head_dim(metadata: Mapping[str, Any], arch: str) -> int | None:
    given = metadata.get(f"{arch}.attention.key_length")
    dim, heads = (metadata.get(f"{arch}.{key}") for key in ("embedding_length", "attention.head_count"))
    if isinstance(given, int):
        return given
    return dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads else None


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
