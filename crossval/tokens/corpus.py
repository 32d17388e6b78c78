"""The corpus on which tokenizers are compared: texts that were written, and texts made of their parts from a seed.

The same seed gives the same bytes on every platform; receipts state the digest of all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bitnet_py.synth_random import Stream
from crossval.tokens import written

SEED = 1
LONG_BYTES = 100_000
OWN = "own specials"
"""Category of texts that depend on the vocabulary; the digest of a corpus is without them."""
_MOST_OWN = 40
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Text:
    """One text; ``data`` is UTF-8, but for those of category ``invalid``."""

    category: str
    data: bytes


@dataclass(frozen=True)
class Corpus:
    """All texts, by category."""

    name: str
    texts: tuple[Text, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names, in order of appearance."""
        return tuple(dict.fromkeys(text.category for text in self.texts))

    @property
    def digest(self) -> str:
        """sha256 over category and text of each, both with their lengths; without ``OWN``."""
        digest = hashlib.sha256()
        for text in self.texts:
            if text.category == OWN:
                continue
            for part in (text.category.encode(), text.data):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


@lru_cache(maxsize=1)
def shipped() -> Corpus:
    """Return the corpus of this version."""
    texts = [Text("written", text.encode()) for text in (*written.LANGUAGES, *written.CODE)]
    for category, (count, make) in _MADE.items():
        stream = Stream(SEED, f"tokens/{category}")
        texts += [Text(category, make(stream)) for _ in range(count)]
    texts += [Text("long", text.encode()) for text in _long(Stream(SEED, "tokens/long"))]
    return Corpus("shipped", tuple(texts))


def with_own(corpus: Corpus, specials: Sequence[str]) -> Corpus:
    """Return a corpus with texts of a vocabulary's special tokens added: whole, doubled, cut, between words."""
    chosen = [text for text in specials if text][:_MOST_OWN]
    texts = [
        Text(OWN, made.encode())
        for text in chosen
        for made in (text, f"a {text} b", f"{text}{text}", f"{text} \n c", text[:-1] or text, f"x{text[1:]}y")
    ]
    return Corpus(corpus.name, (*corpus.texts, *texts))


def of_file(path: str, data: bytes) -> Corpus:
    """Return the lines of a file as a corpus; empty ones are left out."""
    return Corpus(path, tuple(Text("lines", line) for line in data.splitlines() if line))


def _words(stream: Stream) -> str:
    """Return a few words in a row out of one sentence, or of two."""
    words = _WORD.findall(stream.choice(written.LANGUAGES))
    first = stream.below(len(words))
    return " ".join(words[first : first + 1 + stream.below(5)])


def _mix(*pools: Sequence[str], least: int = 1, most: int = 8) -> Callable[[Stream], bytes]:
    """Return a maker of texts out of items of several pools, with and without spaces and words between them."""

    def make(stream: Stream) -> bytes:
        parts = []
        for _ in range(least + stream.below(most - least + 1)):
            parts.append(stream.choice(stream.choice(pools)))
            parts.append(("", "", " ", "  ", "a", _words(stream))[stream.below(6)])
        return "".join(parts).encode()

    return make


def _sentences(stream: Stream) -> bytes:
    parts = [_words(stream)]
    for _ in range(stream.below(5)):
        parts += [stream.choice(written.PUNCTUATION), (" ", "", "\n")[stream.below(3)], _words(stream)]
    return "".join(parts).encode()


def _space_runs(stream: Stream) -> bytes:
    parts = []
    for _ in range(1 + stream.below(5)):
        parts.append(stream.choice(written.SPACES) * (1 + stream.below(2) * stream.below(12)))
        parts.append(stream.choice(written.SPACES) if stream.below(3) == 0 else "")
        parts.append(("", "x", "1", ".", _words(stream))[stream.below(5)])
    return "".join(parts).encode()


def _digits(stream: Stream) -> bytes:
    parts = []
    for _ in range(1 + stream.below(4)):
        parts.append("".join(str(stream.below(10)) for _ in range(1 + stream.below(14))))
        parts.append(stream.choice((".", ",", " ", "-", ":", "/", "e", "x", "", "'", "\u00a0", "٣", "²", "５")))
    return "".join(parts).encode()


def _code(stream: Stream) -> bytes:
    lines = "\n".join(stream.choice(written.CODE) for _ in range(2)).split("\n")
    first = stream.below(len(lines))
    return "\n".join((" " * stream.below(9)) + line for line in lines[first : first + 4]).encode()


def _controls(stream: Stream) -> bytes:
    def char() -> str:
        pools = ((0x00, 0x20), (0x7F, 0x21), (0x200B, 5), (0x202A, 5), (0x2066, 4), (0xFFF9, 3), (0xE0001, 1))
        first, count = stream.choice(pools)
        return chr(first + stream.below(count))

    return "".join(char() + ("", "a", " ", "9")[stream.below(4)] for _ in range(1 + stream.below(8))).encode()


def _points(stream: Stream) -> bytes:
    """Return code points from everywhere, assigned or not; neighbours, so that properties change in between."""
    ends = (0x250, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000)
    base = stream.below(stream.choice(ends))
    points = (base + stream.below(48) for _ in range(2 + stream.below(10)))
    return "".join(chr(point) for point in points if point < 0x110000 and not 0xD800 <= point < 0xE000).encode()


def _lookalikes(stream: Stream) -> bytes:
    """Return special tokens, whole or not quite: cut, in other letters, with a space inside, doubled."""
    parts = []
    for _ in range(1 + stream.below(4)):
        text = stream.choice(written.SPECIALS)
        cut = 1 + stream.below(len(text) - 1)
        changed = (text[:cut], text[cut:], text.upper(), f"{text[:cut]} {text[cut:]}", f"<{text}>", text + text)
        parts.append(stream.choice(changed) if stream.below(2) else text)
        parts.append(("", " ", "\n", "a", " b ", _words(stream))[stream.below(6)])
    return "".join(parts).encode()


def _invalid(stream: Stream) -> bytes:
    bad = stream.choice(written.INVALID)
    before, after = _words(stream).encode(), _words(stream).encode()
    cut = stream.below(len(before) + 1)  # may fall into a character
    return (bad, before + bad, bad + after, before[:cut] + bad + after, before + bad + bad)[stream.below(5)]


_MADE: dict[str, tuple[int, Callable[[Stream], bytes]]] = {
    "languages": (400, _sentences),
    "spaces": (300, _space_runs),
    "numbers": (150, _mix(written.NUMBERS)),
    "digits": (150, _digits),
    "code": (150, _code),
    "emoji": (150, _mix(written.EMOJI)),
    "marks": (200, _mix(written.MARKS)),
    "contractions": (150, _mix(written.CONTRACTIONS)),
    "punctuation": (200, _mix(written.PUNCTUATION, written.SPACES)),
    "controls": (100, _controls),
    "code points": (250, _points),
    "specials": (250, _lookalikes),
    "invalid": (60, _invalid),
}
"""Category -> how many texts, and how one is made."""


def _long(stream: Stream) -> list[str]:
    """Return texts of about 100 kB without a space: one letter, random letters, a script of three-byte letters."""
    letters = stream.bytes(LONG_BYTES) % 26 + ord("a")
    han = stream.uint16(LONG_BYTES // 3) % 2000 + 0x4E00
    word = "".join(_WORD.findall(written.LANGUAGES[0]))[:-1]
    return [
        "a" * LONG_BYTES,
        letters.tobytes().decode(),
        "".join(map(chr, han.tolist())),
        word * (LONG_BYTES // len(word)),
        "12" * (LONG_BYTES // 2),
        "=-" * (LONG_BYTES // 2),
    ]
