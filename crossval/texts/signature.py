"""What the text of an engine looks like, and where it leaves the right one: nothing here knows any fault."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal[
    "empty",
    "broken characters",
    "pieces of the vocabulary",
    "special tokens",
    "exclamation marks",
    "one piece repeated",
    "ends in one piece repeated",
    "ends in a loop",
    "no spaces",
    "readable and short",
    "readable",
]
"""The first that applies, in this order. ``exclamation marks``: it ends in many; "!" is token 0 of vocabularies
that descend from GPT-2's, and token 0 is what many engines pick from logits that are NaN. ``readable``: none of
the others, whatever it says."""
READABLE: tuple[Form, ...] = ("readable and short", "readable")
Departure = Literal["none", "at once", "later", "stops early", "goes on"]
"""Where a text leaves the right one: not at all, at its first token, later, at its end, or by not ending there."""

MIN_RUN = 4
"""One piece repeated: at least so often in a row."""
MIN_LOOP = 3
"""A loop: its part at least so often in a row."""
MAX_PIECE, MAX_PART = 16, 80
"""Characters of the repeated piece, and of a loop's part."""
MIN_UNSPACED = 24
"""Characters without any space from which on a text is called so."""
MAX_SHORT = 6
"""Words of a short text."""
_SPECIAL = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos|end_of_turn|start_of_turn)>|\[/?INST\]")
_PIECES = re.compile(r"[ĠĊ▁]|<0x[0-9A-F]{2}>")
_MOJIBAKE = re.compile(r"[ÂÃâ][\x80-\xbf\u2018-\u203a\u20ac\u0152-\u0178\u02c6\u02dc]")


def form_of(text: str) -> Form:
    """Return what a text looks like."""
    if not text.strip():
        return "empty"
    if _broken(text):
        return "broken characters"
    if _PIECES.search(text):
        return "pieces of the vocabulary"
    if _SPECIAL.search(text):
        return "special tokens"
    body = text.strip()
    if body.endswith("!" * MIN_RUN):
        return "exclamation marks"
    whole, run, loop = _repeated(body)
    if whole:
        return "one piece repeated"
    if run:
        return "ends in one piece repeated"
    if loop:
        return "ends in a loop"
    if len(body) >= MIN_UNSPACED and not re.search(r"\s", body):
        return "no spaces"
    return "readable and short" if len(body.split()) <= MAX_SHORT else "readable"


def _broken(text: str) -> bool:
    return bool(_MOJIBAKE.search(text)) or any(
        char == "\ufffd" or (unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") and char not in "\n\t\r")
        for char in text
    )


def _repeated(body: str) -> tuple[bool, bool, bool]:
    """Return whether the whole text is one piece repeated, ends in such a run, or ends in a longer loop."""
    loop = False
    for size in range(1, min(MAX_PART, len(body) // MIN_LOOP + 1) + 1):
        covered, words = _covered(body, size), set(body[-size:].split())
        start = len(body) - covered
        covered += start == 0 and size > 1  # the space before the first was cut
        if len(words) <= 1 and size <= MAX_PIECE:
            if covered >= MIN_RUN * size:
                return len(body[:start].strip()) < size, True, False
        else:
            loop = loop or covered >= MIN_LOOP * size
    return False, False, loop


def _covered(body: str, size: int) -> int:
    """Return how many characters at the end repeat every ``size`` characters."""
    n = size
    while n < len(body) and body[-n - 1] == body[-n - 1 + size]:
        n += 1
    return n


@dataclass(frozen=True)
class Right:
    """What should have been printed: the bytes of each token, and whether the text ends there or was cut."""

    tokens: tuple[bytes, ...]
    ended: bool


def departure_of(text: str, right: Right) -> tuple[Departure, int]:
    """Return where a text leaves the right one, and how many tokens of that are right.

    Whitespace before either text, and after them, is ignored. A right text that was cut is compared as far as it
    goes.
    """
    made, whole = text.strip().encode(), b"".join(right.tokens)
    before = len(whole) - len(whole.lstrip())
    n_right, at = 0, 0
    for token in right.tokens:
        at += len(token)
        if made[: max(at - before, 0)] != whole[before:at]:
            break
        n_right += 1
    ending = whole.strip()
    if made == ending or (not right.ended and made.startswith(ending)):
        return "none", len(right.tokens)
    if made.startswith(ending):
        return "goes on", len(right.tokens)
    if ending.startswith(made):
        return "stops early", n_right if made else 0
    seen = any(token.strip() for token in right.tokens[:n_right])
    return ("later" if seen else "at once"), n_right


def starts_with(text: str, right: Sequence[bytes]) -> bool:
    """Return whether a text begins with these tokens, or they with it; whitespace around it aside."""
    made, whole = text.strip().encode(), b"".join(right).lstrip()
    return made.startswith(whole) or whole.startswith(made)
