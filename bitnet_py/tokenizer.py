"""Text to token ids and back, as bitnet.cpp's ``llama_tokenize``, from the model's own vocabulary.

Order of work (``llama_tokenize_internal``, llama-vocab.cpp, the same in both generations): BOS if
the vocabulary asks for it; special tokens are cut out of the text, longest first; each piece of
plain text between them is encoded by itself (``byte_pairs``, ``sentencepiece``); EOS if asked for.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bitnet_py.arithmetic import Generation
from bitnet_py.byte_pairs import ByteLevelBPE
from bitnet_py.errors import InputError, TokenizerError
from bitnet_py.sentencepiece import SPACE, SentencePiece
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer_json import read_vocabulary
from bitnet_py.vocabulary import Vocabulary, byte_alphabet

_CHAR_TO_BYTE = {char: byte for byte, char in byte_alphabet().items()}
_HIDDEN = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN})
_SPECIAL = _HIDDEN | {TokenKind.USER_DEFINED}
_C_SPACES = " \t\n\v\f\r"


class _HasMetadata(Protocol):
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class Tokenizer:
    """The tokenizer of a vocabulary. Safe to share between threads; calls do not depend on earlier ones."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        build = ByteLevelBPE if vocabulary.model == "gpt2" else SentencePiece
        self._plain = build(vocabulary)
        special = [i for i, kind in enumerate(vocabulary.kinds) if kind in _SPECIAL]
        special.sort(key=lambda i: -len(vocabulary.tokens[i].encode()))
        self._special = tuple((vocabulary.tokens[i], i, vocabulary.kinds[i] in _HIDDEN) for i in special)

    @classmethod
    def from_gguf(cls, gguf: _HasMetadata, generation: Generation = "march") -> Tokenizer:
        """Build the tokenizer of an open GGUF file, as a generation of bitnet.cpp understands it.

        Raises ``TokenizerError`` when its metadata is unusable, ``ModelError`` for a string that is
        not UTF-8.
        """
        try:
            return cls(Vocabulary.from_metadata(gguf.metadata, generation))
        except TokenizerError as error:
            path = getattr(gguf, "path", None)
            raise TokenizerError(str(error) if path is None else f"{path}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """Build a tokenizer from a ``tokenizer.json``. Raises ``TokenizerError`` when it is unusable."""
        return cls(read_vocabulary(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, or None."""
        return self.vocabulary.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end generation: EOS, end of turn and the like; may be empty."""
        return self.vocabulary.end_ids

    @property
    def pre(self) -> str | None:
        """Name of the pre-tokeniser in effect (``llama-bpe``, ``default``, ...); None for SentencePiece."""
        return self.vocabulary.pre_type.name if self.vocabulary.pre_type is not None else None

    def encode(self, text: str | bytes, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        ``add_bos`` is ``llama_tokenize``'s ``add_special``: BOS and EOS are added where the
        vocabulary asks for them, and only there. With ``parse_special`` the text of a special token
        becomes that token; without it only user-defined tokens are recognised. ``bytes`` need not
        be UTF-8. Raises ``InputError`` for text that is not valid Unicode (lone surrogates) or that
        bitnet.cpp cannot read, and ``TokenizerError`` for a byte that no token of an incomplete
        SentencePiece vocabulary can express; a byte-level one drops it, as bitnet.cpp does.
        """
        vocabulary = self.vocabulary
        ids: list[int] = []
        if add_bos and vocabulary.add_bos and vocabulary.bos_id is not None:
            ids.append(vocabulary.bos_id)
        for piece in self._pieces_of(text, parse_special):
            ids += [piece] if isinstance(piece, int) else self._plain.encode(piece)
        if add_bos and vocabulary.add_eos and vocabulary.eos_id is not None:
            ids.append(vocabulary.eos_id)
        return ids

    def decodable(self, text: str | bytes, *, add_bos: bool = True, parse_special: bool = True) -> bytes:
        """Return what the pieces of ``encode``'s ids are when joined, special tokens as their text.

        Not always the text: SentencePiece puts spaces before it and knows no ``▁``, and bytes that
        are not UTF-8 may be replaced. Raises as ``encode``.
        """
        vocabulary = self.vocabulary
        parts = []
        for role, is_added in ((vocabulary.bos_id, vocabulary.add_bos), (vocabulary.eos_id, vocabulary.add_eos)):
            parts.append(vocabulary.tokens[role].encode() if add_bos and is_added and role is not None else b"")
        middle = [
            vocabulary.tokens[piece].encode() if isinstance(piece, int) else self._plain.readable(piece)
            for piece in self._pieces_of(text, parse_special)
        ]
        return parts[0] + b"".join(middle) + parts[1]

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Return the bytes of one token, as ``llama_token_to_piece`` does; may be part of a UTF-8 sequence.

        Control and unknown tokens give nothing with ``skip_special``, else their text; unused ones
        always nothing. Raises ``TokenizerError`` for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        text, kind = self.vocabulary.tokens[token_id], self.vocabulary.kinds[token_id]
        if kind in _SPECIAL:
            return b"" if skip_special and kind in _HIDDEN else text.encode()
        if kind == TokenKind.BYTE and self.vocabulary.model == "llama":
            return bytes([int(text[3:5], 16)])
        if kind != TokenKind.NORMAL:
            return b""
        if self.vocabulary.model == "llama":
            return text.replace(SPACE, " ").encode()
        try:
            return bytes([_CHAR_TO_BYTE[char] for char in text])
        except KeyError:
            return b"".join(_piece_byte(char, text) for char in text)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """Return the exact bytes of ``ids``. Raises ``TokenizerError`` for an id outside the vocabulary."""
        return b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD. Raises ``TokenizerError``."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_stream(self, *, skip_special: bool = True) -> DecodeStream:
        """Return a decoder for tokens that arrive one at a time."""
        return DecodeStream(self, skip_special=skip_special)

    def _pieces_of(self, text: str | bytes, parse_special: bool) -> list[str | int]:
        """Return special tokens and the texts between them, with the spaces that the vocabulary puts before."""
        pieces = self._split_special(_readable(text), parse_special)
        if self.vocabulary.add_space_prefix:
            for n, piece in enumerate(pieces):
                if isinstance(piece, str) and (n == 0 or isinstance(pieces[n - 1], int)):
                    pieces[n] = " " + piece
        return pieces

    def _split_special(self, text: str, parse_special: bool) -> list[str | int]:
        pieces: list[str | int] = [text] if text else []
        for special, token_id, hidden in self._special:
            if (hidden and not parse_special) or special not in text:
                continue
            split: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, int):
                    split.append(piece)
                    continue
                for n, part in enumerate(piece.split(special)):
                    split += [token_id] * (n > 0)
                    rest = part.lstrip(_C_SPACES) if n > 0 and token_id in self.vocabulary.strip_after else part
                    split += [rest] * bool(rest)
            pieces = split
        return pieces


class DecodeStream:
    """Decodes tokens one at a time and never returns part of a character: incomplete bytes wait for the rest.

    The pieces joined equal ``Tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes; often empty. Raises ``TokenizerError`` for a bad id."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def flush(self) -> str:
        """Return the rest at the end: U+FFFD for an incomplete character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _readable(text: str | bytes) -> str:
    """Return text with its bytes that are not UTF-8 as surrogates (``surrogateescape``)."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
    return text


def _piece_byte(char: str, text: str) -> bytes:
    """Return a character's byte, or bitnet.cpp's marker for one outside the alphabet (``llama_decode_text``)."""
    byte = _CHAR_TO_BYTE.get(char)
    return bytes([byte]) if byte is not None else f"[UNK_BYTE_0x{char.encode().hex()}{text}]".encode()
