"""``crossval tokens``."""

from __future__ import annotations

from typing import Any

import crossval
from crossval.cli.options import MODEL, engine_option, file, receipt_command
from crossval.engines.words import shown
from crossval.receipts.file import Receipt
from crossval.tokens.party import NAMES, TAKES

_WORDS = [shown(name, TAKES) for name in NAMES]


@receipt_command(
    "tokens",
    MODEL,
    engine_option(
        "reference",
        _WORDS,
        "bitnet.cpp",
        "Whose token ids are right. tiktoken: a second opinion on llama-bpe, over Llama 3's tokenizer.model.",
        envvar=None,
    ),
    engine_option(
        "candidate",
        _WORDS,
        "bitnet_py",
        "Tokenizer under test; bitnet_py follows the generation of the library it is compared with.",
        envvar=None,
    ),
    file("--corpus", "corpus", "Compare the lines of this file instead of the texts that ship with crossval."),
)
def command(**options: Any) -> Receipt:
    """Compare the token ids of two tokenizers on thousands of texts, with the vocabulary of one model file.

    The texts are in many languages and scripts; further ones are made of white space, numbers, code,
    emoji, combining marks, control characters, look-alikes of special tokens, bytes that are not
    UTF-8, and 100 kB without a space. Each is read as a prompt and as plain text. The first
    difference is shown as pieces. Of the file nothing but the vocabulary is read. Exit 0 when all
    ids agree and the pieces give every text back, 1 when not, 3 when a text could not be compared.

    \b
    Example:
      crossval tokens --model m.gguf
      crossval tokens --model m.gguf --override tokenizer.ggml.pre=llama-bpe --receipt tokens.json
    """
    return crossval.compare_tokens(**options)
