"""The tokenizer of a checkpoint as the ``tokenizer.*`` keys of a GGUF."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py.checkpoint import read_json
from bitnet_py.errors import TokenizerError, model_error
from bitnet_py.sentencepiece_file import Piece, read_pieces
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer_json import read_vocabulary
from bitnet_py.vocabulary import TokenizerModel

JSON_NAME, SPM_NAME = "tokenizer.json", "tokenizer.model"
CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
ADDED_NAME = "added_tokens.json"
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
    chat_template: str | None


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
    path = folder / JSON_NAME
    vocabulary = read_vocabulary(path)
    tokens = list(vocabulary.tokens)
    eos_id = _id_of(_config(folder), "eos_token", tokens)
    assert vocabulary.pre_type is not None
    return TokenizerKeys(
        model="gpt2",
        pre=vocabulary.pre_type.name,
        tokens=_padded(path, tokens, vocab_size),
        kinds=(*vocabulary.kinds, *[int(TokenKind.UNUSED)] * (vocab_size - len(tokens))),
        merges=tuple(f"{left} {right}" for left, right in vocabulary.merges),
        scores=(),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id if eos_id is None else eos_id,
        add_bos=vocabulary.add_bos,
        add_eos=vocabulary.add_eos,
        add_space_prefix=False,
        chat_template=read_chat_template(folder),
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
    return TokenizerKeys(
        model="llama",
        pre=None,
        tokens=_padded(path, tokens, vocab_size),
        kinds=(*(int(piece.kind) for piece in pieces), *[int(TokenKind.UNUSED)] * n_missing),
        merges=(),
        scores=(*(piece.score for piece in pieces), *[UNSCORED] * n_missing),
        bos_id=_id_of(config, "bos_token", tokens, "<s>"),
        eos_id=_id_of(config, "eos_token", tokens, "</s>"),
        add_bos=config.get("add_bos_token", True) is True,
        add_eos=config.get("add_eos_token", False) is True,
        add_space_prefix=config.get("add_prefix_space", True) is not False,
        chat_template=read_chat_template(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}


def _id_of(config: dict[str, Any], key: str, tokens: list[str], default: str | None = None) -> int | None:
    """Return the id of a special token that the configuration names, as text or as an object."""
    given = config.get(key)
    text = given.get("content") if isinstance(given, dict) else given
    wanted = text if isinstance(text, str) else default
    return tokens.index(wanted) if wanted in tokens else None


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
