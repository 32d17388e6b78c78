"""Two tokenizers over all texts of a corpus, in both ways a text can be read; their pieces against the text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_py.errors import BitnetError
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from crossval.bitnet_cpp.vocabulary import Refused
from crossval.terms import SIDES, Progress, Side
from crossval.tokens.corpus import Corpus, with_own
from crossval.tokens.party import Ids, TokenizerParty

MODES = {"prompt": True, "plain": False}
"""Name -> whether BOS and EOS are added where the vocabulary asks for them, and special tokens are recognised."""
SHOWN = 8
"""Tokens of each side shown from the first difference on; two before it."""
_BEFORE = 2
_SHOWN_BYTES = 120
_WITHOUT_PIECE = (TokenKind.UNUSED, TokenKind.UNDEFINED, TokenKind.BYTE)


@dataclass(frozen=True)
class Row:
    """One category of the corpus in one mode: what both tokenizers made of its texts."""

    mode: str
    category: str
    n_texts: int
    n_equal: int
    n_different: int
    n_refused: int
    """By both."""
    n_refused_by: Mapping[Side, int]
    """By this one alone."""
    n_tokens: int
    """Of the texts with equal ids."""
    digests: Mapping[Side, str]
    """sha256 over the ids of every text; a refusal counts as no ids."""
    n_lost: Mapping[Side, int]
    """Texts that this side's pieces do not give back."""

    @property
    def ok(self) -> bool:
        """Whether no text was read differently, or lost."""
        return not (self.n_different or any(self.n_refused_by.values()) or any(self.n_lost.values()))


@dataclass(frozen=True)
class Seen:
    """What one side made of the first text that differs, around the first token that does."""

    n_ids: int | None
    """None: it refused."""
    ids: tuple[int, ...]
    """From ``start`` on."""
    pieces: tuple[str, ...]
    refused: str | None


@dataclass(frozen=True)
class Difference:
    """The first text that both sides read differently."""

    mode: str
    category: str
    index: int
    """Of the text in the corpus."""
    text: str
    """Its bytes in hexadecimal, the first ones."""
    at: int
    """Of the first token that differs; 0 where a side refused."""
    start: int
    """Of the first token shown."""
    seen: Mapping[Side, Seen]


@dataclass(frozen=True)
class TokensResult:
    """Everything that was compared."""

    corpus: str
    corpus_digest: str
    n_texts: int
    rows: tuple[Row, ...]
    n_pieces: int
    n_pieces_equal: int
    first_difference: Difference | None
    elapsed_s: Mapping[Side, float]
    """Spent in each tokenizer, for all texts in both modes."""


def compare(
    parties: Mapping[Side, TokenizerParty], tokenizer: Tokenizer, corpus: Corpus, progress: Progress
) -> TokensResult:
    """Run both tokenizers over a corpus, and texts made of the vocabulary's own special tokens.

    ``tokenizer``: ours, which says what the pieces have to give back.
    """
    vocabulary = tokenizer.vocabulary
    special = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
    own = [text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in special]
    corpus = with_own(corpus, own)
    pieces = {side: party.pieces() for side, party in parties.items()}
    longest = max(map(len, pieces.values()))
    n_equal = sum(a == b for a, b in zip(pieces["candidate"], pieces["reference"], strict=False))
    elapsed = dict.fromkeys(SIDES, 0.0)
    rows: list[Row] = []
    first: Difference | None = None
    of_category = {name: _of(corpus, name) for name in corpus.categories}
    for mode, parsed in MODES.items():
        for category, chosen in of_category.items():
            progress("comparing token ids", len(rows), len(MODES) * len(of_category))
            texts = [corpus.texts[index].data for index in chosen]
            found: dict[Side, Sequence[Ids]] = {}
            for side, party in parties.items():
                began = time.perf_counter()
                found[side] = party.tokenize_each(texts, add_bos=parsed, parse_special=parsed)
                elapsed[side] += time.perf_counter() - began
            rows.append(_row(mode, category, texts, found, pieces, tokenizer))
            if first is None:
                first = _first(mode, category, chosen, texts, found, pieces)
    progress("comparing token ids", len(rows), len(rows))
    return TokensResult(
        corpus.name, corpus.digest, len(corpus.texts), tuple(rows), longest, n_equal, first, elapsed
    )


def _of(corpus: Corpus, category: str) -> list[int]:
    return [index for index, text in enumerate(corpus.texts) if text.category == category]


def _row(
    mode: str,
    category: str,
    texts: Sequence[bytes],
    found: Mapping[Side, Sequence[Ids]],
    pieces: Mapping[Side, Sequence[bytes]],
    tokenizer: Tokenizer,
) -> Row:
    pairs = list(zip(found["candidate"], found["reference"], strict=True))
    refused = {side: [isinstance(ids, Refused) for ids in found[side]] for side in SIDES}
    equal = [ours for ours, theirs in pairs if not isinstance(ours, Refused) and ours == theirs]
    both = sum(a and b for a, b in zip(refused["candidate"], refused["reference"], strict=True))
    alone = {side: sum(refused[side]) - both for side in SIDES}
    lost = {
        side: sum(
            _is_lost(ids, text, pieces[side], tokenizer, MODES[mode])
            for text, ids in zip(texts, found[side], strict=True)
        )
        for side in SIDES
    }
    return Row(
        mode=mode,
        category=category,
        n_texts=len(texts),
        n_equal=len(equal),
        n_different=len(texts) - len(equal) - both - sum(alone.values()),
        n_refused=both,
        n_refused_by=alone,
        n_tokens=sum(map(len, equal)),
        digests={side: digest_of(found[side]) for side in SIDES},
        n_lost=lost,
    )


def digest_of(found: Sequence[Ids]) -> str:
    """Return the sha256 over the ids of every text: count, then ids, as little-endian int32; -1 for a refusal."""
    digest = hashlib.sha256()
    for ids in found:
        numbers = [-1] if isinstance(ids, Refused) else [len(ids), *ids]
        digest.update(b"".join(number.to_bytes(4, "little", signed=True) for number in numbers))
    return digest.hexdigest()


def _is_lost(ids: Ids, text: bytes, pieces: Sequence[bytes], tokenizer: Tokenizer, special: bool) -> bool:
    """Return whether the pieces of ids fail to give a text back; some tokens have none by their kind."""
    if isinstance(ids, Refused):
        return False
    if any(not 0 <= token < len(pieces) for token in ids):
        return True
    kinds = tokenizer.vocabulary.kinds
    if any(kinds[token] in _WITHOUT_PIECE and not pieces[token] for token in ids):
        return False
    try:
        return b"".join(pieces[i] for i in ids) != tokenizer.decodable(
            text, add_bos=special, parse_special=special
        )
    except BitnetError:
        return False  # ours refuses the text, which the ids already say


def _first(
    mode: str,
    category: str,
    chosen: Sequence[int],
    texts: Sequence[bytes],
    found: Mapping[Side, Sequence[Ids]],
    pieces: Mapping[Side, Sequence[bytes]],
) -> Difference | None:
    for n, (ours, theirs) in enumerate(zip(found["candidate"], found["reference"], strict=True)):
        if ours == theirs or (isinstance(ours, Refused) and isinstance(theirs, Refused)):
            continue
        at = 0
        if not isinstance(ours, Refused) and not isinstance(theirs, Refused):
            both = zip(ours, theirs, strict=False)
            at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ours), len(theirs)))
        start = max(0, at - _BEFORE)
        seen = {side: _seen(found[side][n], start, pieces[side]) for side in SIDES}
        shown = texts[n][:_SHOWN_BYTES].hex()
        return Difference(mode, category, chosen[n], shown, at, start, seen)
    return None


def _seen(ids: Ids, start: int, pieces: Sequence[bytes]) -> Seen:
    if isinstance(ids, Refused):
        return Seen(None, (), (), ids.reason)
    shown = tuple(ids[start : start + _BEFORE + SHOWN])
    return Seen(len(ids), shown, tuple(show_piece(pieces, token) for token in shown), None)


def show_piece(pieces: Sequence[bytes], token: int) -> str:
    """Return a token's piece as text; bytes that are not UTF-8 as escapes."""
    if not 0 <= token < len(pieces):
        return "(no such token)"
    return pieces[token].decode("utf-8", "backslashreplace")


def thresholds() -> dict[str, Any]:
    """Return what is required: every text read alike in both modes."""
    return {"modes": list(MODES), "least_equal": 1.0}
