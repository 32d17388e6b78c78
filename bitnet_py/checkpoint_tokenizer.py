"""The tokenizer of a checkpoint as the ``tokenizer.*`` keys of a GGUF."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.checkpoint import read_json
from bitnet_py.errors import TokenizerError, model_error
from bitnet_py.tokenizer_json import read_vocabulary
from bitnet_py.vocabulary import TokenKind

JSON_NAME, SPM_NAME = "tokenizer.json", "tokenizer.model"
CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
_PAD = re.compile(r"\[PAD[0-9]+\]")


@dataclass(frozen=True)
class TokenizerKeys:
    """A byte-level BPE tokenizer as GGUF states it."""

    pre: str
    tokens: tuple[str, ...]
    """One per row of the embedding; rows without a token are ``[PAD{id}]``."""
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerKeys:
    """Read ``tokenizer.json`` of a checkpoint and the chat template beside it.

    Raises:
        TokenizerError: no such file, a tokenizer that is not supported, or more tokens than rows of the embedding.
        ModelError: a malformed ``tokenizer_config.json``.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        found = f"only {SPM_NAME}" if (folder / SPM_NAME).is_file() else "none"
        error = model_error(
            folder, "tokenizer", expected=JSON_NAME, found=found,
            remedy="tokenizers in other files are not supported: add the model's tokenizer.json",
        )  # fmt: skip
        raise TokenizerError(str(error))
    vocabulary = read_vocabulary(path)
    n_missing = vocab_size - len(vocabulary.tokens)
    if n_missing < 0:
        raise TokenizerError(f"{path}: expected at most {vocab_size} tokens, found {len(vocabulary.tokens)}")
    first = len(vocabulary.tokens)
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    eos_id = vocabulary.eos_id
    if isinstance(config.get("eos_token"), str) and config["eos_token"] in vocabulary.tokens:
        eos_id = vocabulary.tokens.index(config["eos_token"])
    return TokenizerKeys(
        pre=vocabulary.pre_type.name,
        tokens=(*vocabulary.tokens, *(f"[PAD{i}]" for i in range(first, vocab_size))),
        kinds=(*vocabulary.kinds, *[int(TokenKind.UNUSED)] * n_missing),
        merges=tuple(f"{left} {right}" for left, right in vocabulary.merges),
        bos_id=vocabulary.bos_id,
        eos_id=eos_id,
        add_bos=vocabulary.add_bos,
        add_eos=vocabulary.add_eos,
        chat_template=read_chat_template(folder),
    )


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
