"""The vocabulary of a tokenizer: tokens, their kinds, merges or scores, and special ids, validated.

Byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``): a token is text in the *byte-level alphabet*,
in which each of the 256 byte values is written as one printable character (GPT-2's table:
``!``..``~``, ``¡``..``¬`` and ``®``..``ÿ`` stand for themselves, the other 68 bytes for U+0100
upwards in order), so that a token may hold part of a UTF-8 sequence. Example: `` é`` is bytes
``20 C3 A9`` and is written ``ĠÃ©``.

SentencePiece (``llama``): a token is plain text in which ``▁`` (U+2581) stands for a space, with a
score; 256 tokens ``<0x00>``..``<0xFF>`` of kind BYTE express what no other token does.

In both, special tokens (kind CONTROL, USER_DEFINED, UNKNOWN) are plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitnet_py import special_tokens
from bitnet_py.arithmetic import Generation
from bitnet_py.errors import TokenizerError, clip
from bitnet_py.pretokenizer import PreType, get_pre_type
from bitnet_py.special_tokens import OLD_KEYS, ROLES, TokenKind
from bitnet_py.string_array import StringArray

TokenizerModel = Literal["gpt2", "llama"]
_DEFAULT_IDS: dict[TokenizerModel, dict[str, int]] = {
    "gpt2": {"bos": 11, "eos": 11},
    "llama": {"bos": 1, "eos": 2},
}
"""What bitnet.cpp adds to a text where the file names no BOS or EOS."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_LLAMA3_TEXTS = ("<|begin_of_text|>", "<|eot_id|>")
_KEY = "tokenizer.ggml."
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def byte_alphabet() -> dict[int, str]:
    """Return the byte-level alphabet: byte value -> character.

    Source: openai/gpt-2 ``encoder.py``, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """A validated vocabulary. Ids are indices into ``tokens``; texts are unique and not empty."""

    model: TokenizerModel
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    """``TokenKind`` of each token; unknown numbers count as UNDEFINED."""
    pre_type: PreType | None
    """Byte-level BPE only."""
    bos_id: int | None
    end_ids: frozenset[int]
    """Ids that end generation; may be empty."""
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    generation: Generation = "march"
    """Whose rules."""
    merges: tuple[tuple[str, str], ...] = ()
    """BPE: pairs by priority, first occurrence kept."""
    ignore_merges: bool = False
    scores: tuple[float, ...] = ()
    """SentencePiece: one per token; the pair whose token has the highest score is joined first."""
    add_space_prefix: bool = False
    """SentencePiece: whether a space is put before text at the beginning and after a special token."""
    strip_after: frozenset[int] = frozenset()
    """Special tokens that swallow the white space that follows them."""
    warnings: tuple[str, ...] = ()
    """One line each: what the file leaves open and bitnet.cpp fills in."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], generation: Generation = "march") -> Vocabulary:
        """Build a vocabulary from GGUF metadata (``tokenizer.ggml.*``), as a generation of bitnet.cpp reads it.

        Raises ``TokenizerError`` for a tokenizer model other than ``gpt2`` and ``llama``, a missing
        or mistyped key, lengths that differ, duplicate tokens, and an id outside the vocabulary;
        ``ModelError`` for a string of the file that is not UTF-8.
        """
        model = _get(metadata, _KEY + "model", str)
        if model not in _DEFAULT_IDS:
            raise TokenizerError(
                f"tokenizer.ggml.model is {clip(model)}; expected 'gpt2' (byte-level BPE) or "
                "'llama' (SentencePiece)"
            )
        tokens = _strings(metadata, _KEY + "tokens")
        raw_kinds = metadata.get(_KEY + "token_type")
        kinds = [int(TokenKind.NORMAL)] * len(tokens) if raw_kinds is None else _ints(raw_kinds)
        ids = {role: _get(metadata, f"{_KEY}{role}_token_id", int, None) for role in ROLES}
        for old, role in OLD_KEYS.items():
            ids[role] = _get(metadata, f"{_KEY}{old}_token_id", int, ids[role])
        pre = get_pre_type(_get(metadata, _KEY + "pre", str, None), generation) if model == "gpt2" else None
        adds_bos = pre.add_bos if pre is not None else True
        parts: dict[str, Any] = {
            "model": model,
            "tokens": tokens,
            "kinds": kinds,
            "ids": ids,
            "add_bos": _get(metadata, _KEY + "add_bos_token", bool, adds_bos),
            "add_eos": _get(metadata, _KEY + "add_eos_token", bool, False),
            "generation": generation,
            "strips": "phi-3" in (name := str(metadata.get("general.name", "")).lower()) or "phi3" in name,
        }
        if pre is not None:
            return cls.build(
                **parts,
                merges=_split_merges(_strings(metadata, _KEY + "merges")),
                pre_type=pre,
                ignore_merges=pre.ignore_merges,
                warnings=missing_pre(metadata),
            )
        return cls.build(
            **parts,
            scores=_scores(metadata.get(_KEY + "scores"), len(tokens)),
            add_space_prefix=_get(metadata, _KEY + "add_space_prefix", bool, True),
        )

    @classmethod
    def build(
        cls,
        *,
        model: TokenizerModel = "gpt2",
        tokens: Sequence[str],
        kinds: Sequence[int],
        ids: Mapping[str, int | None],
        add_bos: bool,
        add_eos: bool,
        generation: Generation = "march",
        merges: Iterable[tuple[str, str]] = (),
        pre_type: PreType | None = None,
        ignore_merges: bool = False,
        scores: Sequence[float] = (),
        add_space_prefix: bool = False,
        strips: bool = False,
        warnings: Iterable[str] = (),
    ) -> Vocabulary:
        """Check the parts, drop repeated merges, find the tokens that end generation, and build a vocabulary.

        ``ids`` maps roles (``special_tokens.ROLES``) to ids or None; ``strips``: special tokens
        swallow white space after them, as bitnet.cpp does for models named Phi-3. Raises
        ``TokenizerError``.
        """
        if not tokens:
            raise TokenizerError("the vocabulary (tokenizer.ggml.tokens) is empty")
        if len(kinds) != len(tokens):
            raise TokenizerError(
                f"tokenizer.ggml.token_type has {len(kinds)} entries, expected {len(tokens)}, one per token"
            )
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        dropped = _dropped_bytes(texts) if model == "gpt2" else []
        index = {text: i for i, text in enumerate(texts)}
        if len(index) != len(texts):
            twice = next(i for i, text in enumerate(texts) if index[text] != i)
            raise TokenizerError(
                f"token {clip(texts[twice])} occurs twice in the vocabulary (ids {twice}, {index[texts[twice]]})"
            )
        for role, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < len(texts):
                raise TokenizerError(
                    f"tokenizer.ggml.{role}_token_id is {token_id}, outside the vocabulary of {len(texts)} tokens"
                )
        added, filled_in = _added_ids(model, texts, ids, {"bos": add_bos, "eos": add_eos})
        if model == "llama":
            _check_byte_tokens(texts, kinds)
        roles = special_tokens.assign(index, kinds, ids, generation)
        return cls(
            model=model,
            tokens=tuple(texts),
            kinds=roles.kinds,
            merges=tuple(dict.fromkeys(merges)),
            pre_type=pre_type,
            bos_id=added["bos"],
            end_ids=roles.end_ids,
            eos_id=added["eos"],
            add_bos=add_bos,
            add_eos=add_eos,
            generation=generation,
            ignore_merges=ignore_merges,
            scores=tuple(scores),
            add_space_prefix=add_space_prefix,
            strip_after=_stripping(index, roles.kinds) if strips else frozenset(),
            warnings=(*warnings, *filled_in, *dropped),
        )


def _dropped_bytes(texts: Sequence[str]) -> list[str]:
    """Return a warning where a byte-level vocabulary lacks a byte that occurs in UTF-8."""
    known = set(texts)
    missing = [byte for byte, char in byte_alphabet().items() if char not in known and byte not in _NEVER_IN_UTF8]
    if not missing:
        return []
    first = f"0x{min(missing):02X}"
    return [
        f"no token stands for {len(missing)} byte values, the first {first}: they are dropped, as bitnet.cpp does"
    ]


def _added_ids(
    model: TokenizerModel, texts: Sequence[str], ids: Mapping[str, int | None], wanted: Mapping[str, bool]
) -> tuple[dict[str, int | None], list[str]]:
    """Return BOS and EOS, and a warning for each that is added without the file naming it."""
    added = {role: ids.get(role) for role in wanted}
    warnings = []
    for role, is_added in wanted.items():
        default = _DEFAULT_IDS[model][role]
        if added[role] is None and is_added:
            if default >= len(texts):
                raise TokenizerError(
                    f"tokenizer.ggml.{role}_token_id is missing, but the tokenizer adds that token to every text; "
                    f"write the id, or tokenizer.ggml.add_{role}_token = false"
                )
            added[role] = default
            if model == "llama":
                continue  # these are SentencePiece's own
            warnings.append(
                f"tokenizer.ggml.{role}_token_id is missing: token {default} ({clip(texts[default])}) is added to "
                "every text, as bitnet.cpp does"
            )
    return added, warnings


def _check_byte_tokens(texts: Sequence[str], kinds: Sequence[int]) -> None:
    for token_id, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind == TokenKind.BYTE and not _BYTE_TOKEN.fullmatch(text):
            raise TokenizerError(
                f"token {token_id} is of kind BYTE: expected <0x00> to <0xFF>, found {clip(text)}"
            )


def _stripping(index: Mapping[str, int], kinds: Sequence[int]) -> frozenset[int]:
    """Return the tokens that swallow white space after them in models named Phi-3."""
    special = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
    ids = {i for i, kind in enumerate(kinds) if kind in special}
    return frozenset(ids - {index.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")})


def missing_pre(metadata: Mapping[str, Any]) -> list[str]:
    """Return a warning where a byte-level BPE vocabulary does not say how text is split; else nothing."""
    if metadata.get(_KEY + "model") != "gpt2" or metadata.get(_KEY + "pre"):
        return []
    known = set(metadata.get(_KEY + "tokens", ()))
    advice = ""
    if all(text in known for text in _LLAMA3_TEXTS):
        advice = "; this vocabulary looks like Llama 3's: try --override tokenizer.ggml.pre=llama-bpe"
    return [f"tokenizer.ggml.pre is missing: text is split by the rule 'default', as bitnet.cpp does{advice}"]


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


def _scores(value: Any, n_tokens: int) -> list[float]:
    """Return the scores; all zero where the file has none, as in bitnet.cpp."""
    if value is None:
        return [0.0] * n_tokens
    try:
        items = [float(item) for item in value]
    except (TypeError, ValueError):
        items = [math.nan]
    if not all(map(math.isfinite, items)):
        raise TokenizerError("tokenizer.ggml.scores is not an array of finite numbers")
    if len(items) != n_tokens:
        raise TokenizerError(f"tokenizer.ggml.scores has {len(items)} entries, expected {n_tokens}, one per token")
    return items


def _split_merges(texts: list[str]) -> list[tuple[str, str]]:
    pairs: list[Any] = [tuple(text.split(" ")) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not pair[0] or not pair[1]:
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {clip(text)}, expected two tokens with one space between"
            )
    return pairs
