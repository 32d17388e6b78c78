"""SentencePiece as llama.cpp runs it: neighbours are joined by the score of the token they make, best first.

Source: ``llm_tokenizer_spm_session`` (llama-vocab.cpp, the same in both generations). Text is cut
into characters by the number of bytes that a lead byte announces, so that bytes that are not UTF-8
get through; whatever ends up as no token is written with one token per byte.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from bitnet_py.errors import TokenizerError
from bitnet_py.vocabulary import Vocabulary

SPACE = "▁"
_CHARACTER = re.compile(
    rb"[\x00-\xBF]|[\xC0-\xDF][\x00-\xFF]?|[\xE0-\xEF][\x00-\xFF]{0,2}|[\xF0-\xFF][\x00-\xFF]{0,3}", re.DOTALL
)
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_INNER_SPACE = re.compile(f"[^{SPACE}]{SPACE}")
_N_CACHED = 1 << 16
_LONGEST_CACHED = 64


class SentencePiece:
    """Text to ids for one vocabulary, without special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._index = {text: i for i, text in enumerate(vocabulary.tokens)}
        self._scores = vocabulary.scores
        self._bytes = [self._byte_token(byte) for byte in range(256)]
        # Where no token has a space after another character, nothing is ever joined across words.
        self._by_words = not any(map(_INNER_SPACE.search, vocabulary.tokens))
        self._cached: Callable[[str], Sequence[int]] = lru_cache(_N_CACHED)(self._join)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; bytes that are not UTF-8 are surrogates (``surrogateescape``).

        Raises ``TokenizerError`` for a byte no token of an incomplete vocabulary can express
        (bitnet.cpp ends the program).
        """
        escaped = text.replace(" ", SPACE)
        if not self._by_words or (not escaped.isprintable() and not _is_unicode(escaped)):
            return self._join_symbols(_characters(escaped))
        ids: list[int] = []
        for word in _WORD.findall(escaped):
            ids += self._cached(word) if len(word) <= _LONGEST_CACHED else self._join(word)
        return ids

    def readable(self, text: str) -> bytes:
        """Return the bytes that the pieces of ``text`` have: its own, but a space for every ``▁``."""
        return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")

    def _join(self, word: str) -> Sequence[int]:
        return self._join_symbols(list(word))

    def _join_symbols(self, symbols: list[str]) -> list[int]:
        """Join neighbours until no two make a token; equal scores are joined from the left."""
        n = len(symbols)
        following = list(range(1, n + 1))
        preceding = list(range(-1, n - 1))
        queue: list[tuple[float, int, int, str]] = []
        get, scores = self._index.get, self._scores

        def add(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right]
            token = get(joined)
            if token is not None:
                heapq.heappush(queue, (-scores[token], left, right, joined))

        for right in range(1, n):
            add(right - 1, right)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # One of the two may have been joined with another meanwhile.
            if not symbols[left] or not symbols[right] or len(symbols[left] + symbols[right]) != len(joined):
                continue
            symbols[left], symbols[right] = joined, ""
            after = following[left] = following[right]
            if after < n:
                preceding[after] = left
                add(left, after)
            if preceding[left] >= 0:
                add(preceding[left], left)
        ids: list[int] = []
        for symbol in symbols:
            if symbol:
                token = get(symbol)
                ids += [token] if token is not None else self._spell(symbol)
        return ids

    def _spell(self, symbol: str) -> list[int]:
        ids = []
        for byte in symbol.encode("utf-8", "surrogateescape"):
            token = self._bytes[byte]
            if token is None:
                raise TokenizerError(f"no token of the vocabulary can express byte 0x{byte:02X} of the text")
            ids.append(token)
        return ids

    def _byte_token(self, byte: int) -> int | None:
        spelled = self._index.get(f"<0x{byte:02X}>")
        return self._index.get(chr(byte)) if spelled is None and byte < 0x80 else spelled


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _characters(text: str) -> list[str]:
    """Cut text as its lead bytes announce; exactly its characters where all of it is UTF-8."""
    data = text.encode("utf-8", "surrogateescape")
    return [part.decode("utf-8", "surrogateescape") for part in _CHARACTER.findall(data)]
