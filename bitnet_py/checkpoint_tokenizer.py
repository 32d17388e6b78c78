"""The tokenizer of a checkpoint as the ``tokenizer.*`` keys of a GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py import tokenizer_names
from bitnet_py.checkpoint import read_json
from bitnet_py.errors import TokenizerError, model_error
from bitnet_py.pretokenizer import get_pre_type
from bitnet_py.sentencepiece_file import Piece, read_pieces
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.tokenizer_json import read_vocabulary
from bitnet_py.vocabulary import TokenizerModel, Vocabulary

JSON_NAME, SPM_NAME = "tokenizer.json", "tokenizer.model"
CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
ADDED_NAME, MODEL_CONFIG_NAME = "added_tokens.json", "config.json"
ROLE_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
"""Special token in a checkpoint -> what GGUF calls it in ``tokenizer.ggml.<name>_token_id``."""
UNSCORED = -1000.0
"""Score of tokens that are no pieces."""
_PAD = re.compile(r"\[PAD[0-9]+\]")


@dataclass(frozen=True)
class TokenizerKeys:
    """A tokenizer as GGUF states it."""

    model: TokenizerModel
    """``gpt2``: byte-level BPE; ``llama``: SentencePiece."""
    pre: str | None
    """BPE only."""
    tokens: tuple[str, ...]
    """One per row of the embedding; rows without a token are ``[PAD{id}]``."""
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    """BPE only."""
    scores: tuple[float, ...]
    """SentencePiece only; values of float32."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    """SentencePiece only."""
    other_ids: Mapping[str, int]
    """Name of a key (``unknown``, ``padding``, ...) -> id; they change no ids of a text."""
    chat_template: str | None
    warnings: tuple[str, ...] = ()
    """One line each: where bitnet.cpp reads text otherwise than the checkpoint's tokenizer."""


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerKeys:
    """Read the tokenizer of a checkpoint and the chat template beside it.

    ``tokenizer.json`` where it is byte-level BPE, else ``tokenizer.model``.

    Raises:
        TokenizerError: no such file, a tokenizer that is not supported, or more tokens than rows of the embedding.
        ModelError: a malformed ``tokenizer_config.json`` or ``added_tokens.json``.
    """
    has_pieces = (folder / SPM_NAME).is_file()
    if not (folder / JSON_NAME).is_file() and not has_pieces:
        error = model_error(
            folder,
            "tokenizer",
            expected=f"{JSON_NAME} or {SPM_NAME}",
            found="none",
            remedy="add the model's tokenizer",
        )
        raise TokenizerError(str(error))
    try:
        return _of_json(folder, vocab_size)
    except TokenizerError:
        if not has_pieces:
            raise
    return _of_pieces(folder, vocab_size)


def _of_json(folder: Path, vocab_size: int) -> TokenizerKeys:
    path, config = folder / JSON_NAME, _config(folder)
    ids = tokenizer_names.ids_of_text(path)
    name = tokenizer_names.name_of(ids)
    vocabulary = read_vocabulary(path, None if name is None else get_pre_type(name))
    tokens = [f"[PAD{i}]" if text == f"[EMPTY_{i}]" else text for i, text in enumerate(vocabulary.tokens)]
    roles = _roles(folder, config, tokens)
    assert vocabulary.pre_type is not None
    return TokenizerKeys(
        model="gpt2",
        pre=vocabulary.pre_type.name,
        tokens=_padded(path, tokens, vocab_size),
        kinds=(*vocabulary.kinds, *[int(TokenKind.UNUSED)] * (vocab_size - len(tokens))),
        merges=tuple(f"{left} {right}" for left, right in vocabulary.merges),
        scores=(),
        bos_id=roles.pop("bos", vocabulary.bos_id),
        eos_id=roles.pop("eos", vocabulary.eos_id),
        add_bos=_flag(config, "add_bos_token", vocabulary.add_bos),
        add_eos=_flag(config, "add_eos_token", vocabulary.add_eos),
        add_space_prefix=False,
        other_ids=roles,
        chat_template=read_chat_template(folder),
        warnings=_read_otherwise(vocabulary, ids),
    )


def _read_otherwise(vocabulary: Vocabulary, ids: list[int]) -> tuple[str, ...]:
    """Return a warning where bitnet.cpp's rule gives a text other ids than ``tokenizer.json`` does.

    ``ids``: those of ``tokenizer_names.TEXT``, with what the file's post-processor adds.
    """
    found = Tokenizer(vocabulary).encode(tokenizer_names.TEXT)
    if found == ids:
        return ()
    assert vocabulary.pre_type is not None
    pairs = zip(found, ids, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(found), len(ids)))
    return (
        f"bitnet.cpp's rule {vocabulary.pre_type.name} reads text otherwise than {JSON_NAME}: the text by which "
        f"converters tell tokenizers has {len(found)} and {len(ids)} tokens, different from token {at} on",
    )


def _of_pieces(folder: Path, vocab_size: int) -> TokenizerKeys:
    """Read ``tokenizer.model`` and ``added_tokens.json``, as bitnet.cpp's converter does."""
    path, config = folder / SPM_NAME, _config(folder)
    pieces = read_pieces(path)
    added = read_json(folder / ADDED_NAME) if (folder / ADDED_NAME).is_file() else {}
    known = {piece.text for piece in pieces}
    pieces += [Piece(text, UNSCORED, TokenKind.USER_DEFINED) for text in added if text not in known]
    tokens = [piece.text for piece in pieces]
    n_missing = vocab_size - len(tokens)
    roles = _roles(folder, config, tokens)
    return TokenizerKeys(
        model="llama",
        pre=None,
        tokens=_padded(path, tokens, vocab_size),
        kinds=(*(int(piece.kind) for piece in pieces), *[int(TokenKind.UNUSED)] * n_missing),
        merges=(),
        scores=(*(piece.score for piece in pieces), *[UNSCORED] * n_missing),
        bos_id=roles.pop("bos", _id_in("<s>", tokens)),
        eos_id=roles.pop("eos", _id_in("</s>", tokens)),
        add_bos=_flag(config, "add_bos_token", default=True),
        add_eos=_flag(config, "add_eos_token", default=False),
        add_space_prefix=_flag(config, "add_prefix_space", default=True),
        other_ids=roles,
        chat_template=read_chat_template(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}


def _roles(folder: Path, config: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Return the special tokens that a checkpoint names: by text in the tokenizer's configuration, else by id.

    As the ``gguf`` package's ``SpecialVocab`` finds them for bitnet.cpp's converter.
    """
    by_id = read_json(folder / MODEL_CONFIG_NAME) if (folder / MODEL_CONFIG_NAME).is_file() else {}
    found: dict[str, int] = {}
    for role, key in ROLE_KEYS.items():
        given = config.get(f"{role}_token")
        text = given.get("content") if isinstance(given, dict) else given
        token_id = _id_in(text, tokens)
        stated = by_id.get(f"{role}_token_id")
        if token_id is None and type(stated) is int and 0 <= stated < len(tokens):
            token_id = stated
        if token_id is not None:
            found[key] = token_id
    return found


def _id_in(text: Any, tokens: list[str]) -> int | None:
    return tokens.index(text) if isinstance(text, str) and text in tokens else None


def _flag(config: dict[str, Any], key: str, default: bool) -> bool:
    given = config.get(key)
    return given if isinstance(given, bool) else default


def _padded(path: Path, tokens: list[str], vocab_size: int) -> tuple[str, ...]:
    if len(tokens) > vocab_size:
        raise TokenizerError(f"{path}: expected at most {vocab_size} tokens, found {len(tokens)}")
    return (*tokens, *(f"[PAD{i}]" for i in range(len(tokens), vocab_size)))


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint: its own file, or the default in ``tokenizer_config.json``.

    Raises:
        ModelError: malformed files.
    """
    own = folder / TEMPLATE_NAME
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise model_error(
                own, "chat template", expected="UTF-8 text", found=error, remedy="download it again"
            ) from None
    if not (folder / CONFIG_NAME).is_file():
        return None
    given = read_json(folder / CONFIG_NAME).get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def is_padding(token: str) -> bool:
    """Return whether a token only fills a row of the embedding that the tokenizer has no token for."""
    return _PAD.fullmatch(token) is not None
