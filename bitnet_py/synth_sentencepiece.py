"""A small SentencePiece vocabulary, trained on ``synth_vocab``'s sentences; the same on every platform."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from bitnet_py.errors import ModelError
from bitnet_py.special_tokens import TokenKind
from bitnet_py.synth_vocab import sentences, train_merges

SPACE = "▁"
_HEAD = (("<unk>", TokenKind.UNKNOWN), ("<s>", TokenKind.CONTROL), ("</s>", TokenKind.CONTROL))
_WORDS = re.compile(f"{SPACE}?[^{SPACE}]+")
_OTHER_LETTERS = "éüñçøåßąλπжйяשםابतक中文日本語한국어€°·—“”…☃"
_SPACES = tuple(SPACE * n for n in (2, 3, 4, 8, 16))
_N_CHARACTERS = 95 + len(_OTHER_LETTERS) + 1
MIN_SIZE = len(_HEAD) + 256 + _N_CHARACTERS + len(_SPACES)


@dataclass(frozen=True)
class SentencePieceVocab:
    """Tokens as GGUF stores them, with ``▁`` for a space."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    scores: tuple[float, ...]
    bos_id: int = 1
    eos_id: int = 2


@lru_cache(maxsize=8)
def build_sentencepiece(
    vocab_size: int, seed: int, extra: Sequence[tuple[str, TokenKind, float]] = ()
) -> SentencePieceVocab:
    """Return a vocabulary of ``vocab_size`` tokens: special ones, 256 bytes, pieces, characters, ``extra``.

    As in Llama 2's, the score of a piece is minus its rank, and characters have the lowest.
    ``extra``: further tokens (text, kind, score). What the sentences have no pieces for is unused
    tokens at the end, as Gemma's vocabulary has them.

    Raises:
        ModelError: ``vocab_size`` is too small.
    """
    n_pieces = vocab_size - MIN_SIZE - len(extra)
    if n_pieces < 0:
        raise ModelError(f"vocabulary: expected {MIN_SIZE + len(extra)} tokens or more, found {vocab_size}")
    words: Counter[tuple[str, ...]] = Counter()
    for sentence in sentences(seed, 3000):
        for word in _WORDS.findall(SPACE + sentence.replace("\n", "").replace(" ", SPACE)):
            words[tuple(word)] += 1
    pieces = [left + right for left, right in train_merges(words, n_pieces)]
    letters = [SPACE, *map(chr, range(0x21, 0x7F)), "\u00a0", *_OTHER_LETTERS]
    rows = [
        *((text, kind, 0.0) for text, kind in _HEAD),
        *((f"<0x{byte:02X}>", TokenKind.BYTE, 0.0) for byte in range(256)),
        *((text, TokenKind.NORMAL, -float(rank)) for rank, text in enumerate([*_SPACES, *pieces])),
        *((text, TokenKind.NORMAL, -float(1e6 + rank)) for rank, text in enumerate(letters)),
        *extra,
        *((f"<unused{n}>", TokenKind.UNUSED, 0.0) for n in range(n_pieces - len(pieces))),
    ]
    assert len(rows) == vocab_size
    tokens, kinds, scores = zip(*rows, strict=True)
    return SentencePieceVocab(tokens, tuple(map(int, kinds)), scores)
