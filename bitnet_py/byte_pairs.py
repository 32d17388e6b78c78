"""Byte-level BPE: words merged pair by pair, by the ``tokenizers`` library.

Text that is not UTF-8 takes another way: bitnet.cpp's decoder (``unicode_cpt_from_utf8``,
unicode.cpp) is more lenient than UTF-8 (overlong forms and surrogates pass), and main puts U+FFFD
for a byte that even it cannot read, where March ends the program.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tokenizers

from bitnet_py.errors import InputError, TokenizerError, raised_by_library, shortened
from bitnet_py.pretokenizer import build_pre_tokenizer, build_splits
from bitnet_py.vocabulary import Vocabulary, byte_alphabet

_ALPHABET = byte_alphabet()
_REPLACEMENT = 0xFFFD
_STAND_IN = "\ue000"
"""Stands for surrogates, which ``tokenizers`` does not take: as they, neither letter, number nor space."""
_MASKS = {2: 0x1F, 3: 0x0F, 4: 0x07}


class ByteLevelBPE:
    """Text to ids for one vocabulary, without special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.pre_type is not None
        self._generation = vocabulary.generation
        vocab = {text: i for i, text in enumerate(vocabulary.tokens)}
        try:
            # It knows no special tokens: those are cut out before it sees the text.
            self._bpe: Any = tokenizers.Tokenizer(
                tokenizers.models.BPE(
                    vocab=vocab, merges=list(vocabulary.merges), ignore_merges=vocabulary.ignore_merges
                )
            )
        except BaseException as error:
            if not raised_by_library(error):
                raise
            reason = shortened(str(error), 100)
            raise TokenizerError(f"tokenizer.ggml.merges does not fit the vocabulary: {reason}") from error
        self._bpe.pre_tokenizer = build_pre_tokenizer(vocabulary.pre_type)
        self._splits = build_splits(vocabulary.pre_type)
        self._known = frozenset(vocab)
        self._missing_bytes = missing_bytes(vocabulary.tokens)
        self._ignore_merges = vocabulary.ignore_merges

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; bytes that are not UTF-8 are surrogates (``surrogateescape``).

        Bytes that no token of an incomplete vocabulary can express are dropped, as bitnet.cpp does.
        Raises ``InputError`` for bytes on which bitnet.cpp ends the program.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            return self._encode_points(self._code_points(text))
        if not self._missing_bytes.isdisjoint(data):
            return self._encode_points([ord(char) for char in text])
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def readable(self, text: str) -> bytes:
        """Return the bytes that are encoded for ``text``: its own, where they are UTF-8. Raises ``InputError``."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = b"".join(map(_bytes_of, self._code_points(text)))
        return bytes(byte for byte in data if byte not in self._missing_bytes) if self._missing_bytes else data

    def _code_points(self, text: str) -> list[int]:
        return _code_points(text.encode("utf-8", "surrogateescape"), replace=self._generation == "main")

    def _encode_points(self, points: list[int]) -> list[int]:
        shown = "".join(_STAND_IN if 0xD800 <= point < 0xE000 else chr(point) for point in points)
        ids: list[int] = []
        for _, (begin, end) in self._splits.pre_tokenize_str(shown):
            word = b"".join(map(_bytes_of, points[begin:end]))
            ids += self._encode_word("".join(map(_ALPHABET.__getitem__, word)))
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Return the ids of a word in the byte-level alphabet; nothing is merged across a dropped byte."""
        whole = self._ignore_merges and word in self._known
        parts = [word] if whole else "".join(char if char in self._known else " " for char in word).split()
        return [token.id for part in parts for token in self._bpe.model.tokenize(part)]


def missing_bytes(tokens: Iterable[str]) -> frozenset[int]:
    """Return the bytes that no token of a byte-level vocabulary stands for."""
    known = frozenset(tokens)
    return frozenset(byte for byte, char in _ALPHABET.items() if char not in known)


def _bytes_of(point: int) -> bytes:
    return chr(point).encode("utf-8", "surrogatepass")


def _code_points(data: bytes, *, replace: bool) -> list[int]:
    """Decode bytes as ``unicode_cpts_from_utf8`` does; ``replace``: U+FFFD for each byte it cannot read.

    Raises ``InputError`` for a byte it cannot read, unless replaced, and for a number beyond
    Unicode.
    """
    points = []
    at = 0
    while at < len(data):
        lead = data[at]
        size = 1 if lead < 0x80 else 2 if 0xC0 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4
        rest = data[at + 1 : at + size]
        readable = lead < 0x80 or 0xC0 <= lead < 0xF8
        if not readable or len(rest) < size - 1 or any(byte & 0xC0 != 0x80 for byte in rest):
            if not replace:
                raise InputError(
                    f"byte {at} of the text, 0x{lead:02X}, is not UTF-8: bitnet.cpp of March 2026 ends the program"
                )
            points.append(_REPLACEMENT)
            at += 1
            continue
        point = lead & _MASKS.get(size, 0x7F)
        for byte in rest:
            point = point << 6 | byte & 0x3F
        if point > 0x10FFFF:
            raise InputError(
                f"byte {at} of the text begins U+{point:X}, beyond Unicode: bitnet.cpp ends the program"
            )
        points.append(point)
        at += size
    return points
