"""Mistakes around the engine: what reads the prompt, picks the next token, ends the text and prints it.

They change no tensor, so the zoo of ``catalogue`` has none of them; they do change the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
"""Of one token: ``(vocab_size,)``."""


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(prompt)


def _pick(logits: Logits, step: int) -> int:
    """Return the largest as engines find it, by comparing each with the best so far: with NaN first, token 0."""
    return 0 if np.isnan(logits[0]) else int(np.nanargmax(logits))


def _print(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids)


@dataclass(frozen=True)
class Around:
    """How an engine reads, picks, ends and prints; right unless replaced."""

    name: str = ""
    family: str = ""
    what: str = ""
    encode: Callable[[Tokenizer, str], list[int]] = _encode
    pick: Callable[[Logits, int], int] = _pick
    ends: Callable[[Tokenizer, int, int], bool] = lambda tokenizer, token, step: token in tokenizer.eos_ids
    show: Callable[[Tokenizer, Sequence[int]], str] = _print
    feeds: Callable[[Sequence[int], int], int] = lambda made, step: made[-1]
    """The token fed next, of those made."""
    row: int = -1
    """Row of the prompt's logits that the first token is picked from."""


def _one_byte_a_token(tokenizer: Tokenizer, prompt: str) -> list[int]:
    first, *rest = tokenizer.encode(prompt[:1])
    return [first, *rest, *(token for char in prompt[1:] for token in tokenizer.encode(char, add_bos=False))]


def _raw_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return "".join(tokenizer.vocabulary.tokens[token] for token in ids if token not in tokenizer.eos_ids)


def _drawn(temperature: float) -> Callable[[Logits, int], int]:
    def pick(logits: Logits, step: int) -> int:
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
        chances = np.exp(scaled) / np.exp(scaled).sum()
        seed = int(np.abs(logits[:16]).sum() * 1e4) + step
        return int(np.random.default_rng(seed).choice(logits.size, p=chances))

    return pick


READS, PICKS, ENDS, PRINTS = "tokenizer", "sampling", "end of text", "detokenizer"
FAULTS = (
    Around("merges-ignored", READS, "one token per character: no merge applied", encode=_one_byte_a_token),
    Around(
        "bos-twice",
        READS,
        "two BOS before the prompt",
        encode=lambda t, text: [t.encode(text)[0], *t.encode(text)],
    ),
    Around(
        "spaces-lost",
        READS,
        "the spaces of the prompt are lost",
        encode=lambda t, text: t.encode(text.replace(" ", "")),
    ),
    Around(
        "ids-shifted",
        READS,
        "every id of the prompt is one too high: another vocabulary",
        encode=lambda t, text: [min(i + 1, t.vocab_size - 1) for i in t.encode(text)],
    ),
    Around(
        "last-token-lost", READS, "the prompt's last token is not fed", encode=lambda t, text: t.encode(text)[:-1]
    ),
    Around(
        "eos-appended",
        READS,
        "an end-of-text token after the prompt",
        encode=lambda t, text: [*t.encode(text), min(t.eos_ids)],
    ),
    Around("argmin", PICKS, "the least likely token is picked", pick=lambda logits, step: int(logits.argmin())),
    Around(
        "second-best",
        PICKS,
        "the second best token is picked",
        pick=lambda logits, step: int(logits.argsort()[-2]),
    ),
    Around(
        "off-by-one",
        PICKS,
        "the token after the best one is picked",
        pick=lambda logits, step: (int(logits.argmax()) + 1) % logits.size,
    ),
    Around("temperature-2", PICKS, "drawn at temperature 2 where greedy was meant", pick=_drawn(2.0)),
    Around("uniform", PICKS, "the logits are ignored", pick=_drawn(1e9)),
    Around("first-row", PICKS, "picked from the logits of the prompt's first token", row=0),
    Around(
        "feeds-first", PICKS, "the first token made is fed again at every step", feeds=lambda made, step: made[0]
    ),
    Around("feeds-0", PICKS, "token 0 is fed at every step", feeds=lambda made, step: 0),
    Around("end-ignored", ENDS, "the end-of-text token does not end the text", ends=lambda t, token, step: False),
    Around("end-after-1", ENDS, "the text ends after one token", ends=lambda t, token, step: step == 0),
    Around(
        "end-at-full-stop",
        ENDS,
        "the text ends at the first token that is a full stop, before it is shown",
        ends=lambda t, token, step: t.decode([token]) == ".",
    ),
    Around("pieces-raw", PRINTS, "pieces are printed as the vocabulary spells them", show=_raw_pieces),
    Around(
        "printed-latin-1",
        PRINTS,
        "bytes printed as Latin-1",
        show=lambda t, ids: t.decode_bytes(ids).decode("latin-1"),
    ),
    Around(
        "printed-shifted",
        PRINTS,
        "every id is printed as the one after it",
        show=lambda t, ids: t.decode([min(i + 1, t.vocab_size - 1) for i in ids]),
    ),
    Around(
        "spaces-not-printed", PRINTS, "spaces are not printed", show=lambda t, ids: t.decode(ids).replace(" ", "")
    ),
    Around(
        "special-printed",
        PRINTS,
        "special tokens are printed",
        show=lambda t, ids: t.decode(ids, skip_special=False),
    ),
)
"""Named mistakes."""
RIGHT = Around()
