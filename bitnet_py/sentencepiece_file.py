"""Read ``tokenizer.model``, the file of a SentencePiece tokenizer: pieces, scores and kinds.

A protocol buffer (sentencepiece_model.proto). Field 1 of the message, repeated, is one piece: text
(1), score (2, float32), type (3; 1 by default). Everything else is skipped.

A field is a varint ``number << 3 | wire type`` and its value: a varint (type 0), 8 bytes (1), a
varint size and that many bytes (2), or 4 bytes (5). A varint holds 7 bits a byte, low ones first;
bit 7 says that another byte follows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.errors import TokenizerError
from bitnet_py.special_tokens import TokenKind

MAX_BYTES = 64 << 20
_KINDS = {1: TokenKind.NORMAL, 2: TokenKind.UNKNOWN, 3: TokenKind.CONTROL, 4: TokenKind.USER_DEFINED}
_KINDS |= {5: TokenKind.UNUSED, 6: TokenKind.BYTE}
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes."""


@dataclass(frozen=True)
class Piece:
    """One token."""

    text: str
    score: float
    """Value of a float32."""
    kind: TokenKind


def read_pieces(path: Path) -> list[Piece]:
    """Return the pieces in the order of their ids.

    Raises:
        TokenizerError: unreadable, malformed, or without pieces.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        pieces = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
        if not pieces:
            raise ValueError("no pieces")
    except (ValueError, struct.error, IndexError, KeyError) as error:
        raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from None
    return pieces


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, _KINDS[kind])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of every field: an int of a varint, else its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes, {len(data) - at} are left")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a varint of more than 10 bytes at byte {at}")
