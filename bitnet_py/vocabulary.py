"""The vocabulary of a byte-level BPE tokenizer: tokens, their kinds, merges and special ids, validated.

A token is text in the *byte-level alphabet*: each of the 256 byte values is written as one
printable character (GPT-2's table: ``!``..``~``, ``¡``..``¬`` and ``®``..``ÿ`` stand for
themselves, the other 68 bytes for U+0100 upwards in order), so that a token may hold part of a
UTF-8 sequence. Example: `` é`` is bytes ``20 C3 A9`` and is written ``ĠÃ©``. Special tokens (kind
CONTROL, USER_DEFINED, UNKNOWN) are plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from bitnet_py.errors import TokenizerError
from bitnet_py.pretokenizer import PreType, get_pre_type
from bitnet_py.string_array import StringArray


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``; the numbers are the GGUF format's."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"),
        *("<|fim_pad|>", "<fim-pad>", "<PAD>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<|file_sep|>"),
    }
)
"""Texts of tokens that end generation, and are CONTROL whatever the file states (``llm_load_vocab``)."""

END_KEYS = tuple(
    f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
)
"""Metadata keys whose token ends generation."""


def byte_alphabet() -> dict[int, str]:
    """Return the byte-level alphabet: byte value -> character.

    Source: openai/gpt-2 ``encoder.py``, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """A validated byte-level BPE vocabulary. Ids are indices into ``tokens``; texts are unique and not empty."""

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    """``TokenKind`` of each token; unknown numbers count as UNDEFINED."""
    merges: tuple[tuple[str, str], ...]
    """Pairs by priority, first occurrence kept."""
    pre_type: PreType
    bos_id: int | None
    end_ids: frozenset[int]
    """Ids that end generation; may be empty."""
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    ignore_merges: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Build a vocabulary from GGUF metadata (``tokenizer.ggml.*``).

        Raises ``TokenizerError`` for a tokenizer model other than ``gpt2``, a missing or mistyped
        key, lengths that differ, duplicate tokens, an id outside the vocabulary, and a missing BOS
        id where BOS is to be added (bitnet.cpp takes id 11 for a BOS or EOS id that is missing or
        out of range); ``ModelError`` for a string of the file that is not UTF-8.
        """
        model = _get(metadata, "tokenizer.ggml.model", str)
        if model != "gpt2":
            raise TokenizerError(f"tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is supported")
        pre_type = get_pre_type(_get(metadata, "tokenizer.ggml.pre", str, None))
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        raw_kinds = metadata.get("tokenizer.ggml.token_type")
        kinds = [int(TokenKind.NORMAL)] * len(tokens) if raw_kinds is None else _ints(raw_kinds)
        ids = {key: _get(metadata, key, int, None) for key in ("tokenizer.ggml.bos_token_id", *END_KEYS)}
        return cls.build(
            tokens=tokens,
            kinds=kinds,
            merges=_split_merges(_strings(metadata, "tokenizer.ggml.merges")),
            pre_type=pre_type,
            ids=ids,
            add_bos=_get(metadata, "tokenizer.ggml.add_bos_token", bool, pre_type.add_bos),
            add_eos=_get(metadata, "tokenizer.ggml.add_eos_token", bool, False),
            ignore_merges=pre_type.ignore_merges,
        )

    @classmethod
    def build(
        cls,
        *,
        tokens: Sequence[str],
        kinds: Sequence[int],
        merges: Iterable[tuple[str, str]],
        pre_type: PreType,
        ids: Mapping[str, int | None],
        add_bos: bool,
        add_eos: bool,
        ignore_merges: bool,
    ) -> Vocabulary:
        """Check the parts, drop repeated merges, find the tokens that end generation, and build a vocabulary.

        ``ids`` maps metadata keys (``tokenizer.ggml.bos_token_id`` and ``END_KEYS``) to ids or
        None. Raises ``TokenizerError``.
        """
        if not tokens:
            raise TokenizerError("the vocabulary (tokenizer.ggml.tokens) is empty")
        if len(kinds) != len(tokens):
            raise TokenizerError(
                f"tokenizer.ggml.token_type has {len(kinds)} entries, expected {len(tokens)}, one per token"
            )
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        index = {text: i for i, text in enumerate(texts)}
        if len(index) != len(texts):
            twice = next(i for i, text in enumerate(texts) if index[text] != i)
            raise TokenizerError(
                f"token {texts[twice]!r} occurs twice in the vocabulary (ids {twice}, {index[texts[twice]]})"
            )
        for key, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < len(texts):
                raise TokenizerError(f"{key} is {token_id}, outside the vocabulary of {len(texts)} tokens")
        bos_id, eos_id = ids.get("tokenizer.ggml.bos_token_id"), ids.get("tokenizer.ggml.eos_token_id")
        for name, wanted, token_id in (("bos", add_bos, bos_id), ("eos", add_eos, eos_id)):
            if wanted and token_id is None:
                raise TokenizerError(
                    f"tokenizer.ggml.{name}_token_id is missing, but the tokenizer adds that token to every text; "
                    f"write the id, or tokenizer.ggml.add_{name}_token = false"
                )
        by_text = {index[text] for text in END_TEXTS if text in index}
        final_kinds = list(kinds)
        for token_id in by_text:
            final_kinds[token_id] = int(TokenKind.CONTROL)
        by_key = {ids[key] for key in END_KEYS if key in ids}
        return cls(
            tokens=tuple(texts),
            kinds=tuple(final_kinds),
            merges=tuple(dict.fromkeys(merges)),
            pre_type=pre_type,
            bos_id=bos_id,
            end_ids=frozenset(by_text | {token_id for token_id in by_key if token_id is not None}),
            eos_id=eos_id,
            add_bos=add_bos,
            add_eos=add_eos,
            ignore_merges=ignore_merges,
        )


_REQUIRED = object()


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    if key not in metadata:
        if default is _REQUIRED:
            raise TokenizerError(f"the model has no {key}; it was converted without its tokenizer")
        return default
    value = metadata[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TokenizerError(f"{key} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"the model has no {key}; it was converted without its tokenizer")
    if isinstance(value, StringArray):
        return value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{key} is not an array of strings")
    return list(value)


def _ints(value: Any) -> list[int]:
    try:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
    except TypeError:
        items = [None]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise TokenizerError("tokenizer.ggml.token_type is not an array of integers")
    return items


def _split_merges(texts: list[str]) -> list[tuple[str, str]]:
    pairs: list[Any] = [tuple(text.split(" ")) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not pair[0] or not pair[1]:
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {text!r}, expected two tokens with one space between"
            )
    return pairs
