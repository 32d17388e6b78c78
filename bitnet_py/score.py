"""How well a model predicts a text: negative log likelihood of every token, teacher-forced, in windows.

The rule of the windows: a window holds at most ``n_context`` tokens. The first is only context, the
others are scored, each given all before it in its window. The first is BOS where the vocabulary
asks for it, else the text's token before the window. So every token of the text is scored exactly
once, but for the very first one of a text without BOS. Windows do not overlap otherwise: a token
early in its window is predicted from little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import InputError
from bitnet_py.logits import check_logits
from bitnet_py.model import Model
from bitnet_py.tokenizer import Tokenizer

MIN_CONTEXT = 2
"""Tokens of the shortest window: one to start from, one to predict."""


@dataclass(frozen=True)
class Window:
    """A piece of a text: the token it starts from, and the tokens to be scored."""

    first: int
    scored: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that are evaluated; the logits of the n-th predict the n-th of ``scored``."""
        return (self.first, *self.scored[:-1])


@dataclass(frozen=True)
class Score:
    """What a model makes of a text."""

    nll: npt.NDArray[np.float64]
    """Negative log likelihood of every scored token, in nats, ``(n_scored,)``."""
    n_bytes: int
    """Bytes of the text that the scored tokens stand for."""
    n_windows: int
    n_context: int
    """Tokens of the longest window allowed."""

    @property
    def mean_nll(self) -> float:
        """Mean negative log likelihood per token, in nats; the sum is rounded once."""
        return math.fsum(self.nll) / self.nll.size

    @property
    def perplexity(self) -> float:
        """``exp(mean_nll)``; infinite beyond binary64."""
        return perplexity(self.mean_nll)

    @property
    def bits_per_byte(self) -> float:
        """Bits that code a byte of the text, which texts in different vocabularies can be compared by."""
        return math.fsum(self.nll) / math.log(2) / self.n_bytes


def score(model: Model, text: bytes, n_context: int | None = None) -> Score:
    """Return the score of a text in UTF-8, read as plain text: what looks like a special token is text.

    Prompts are evaluated in passes of ``model.n_ubatch`` tokens, as ``Model.forward`` does.

    Args:
        model: an open model.
        text: its bytes.
        n_context: tokens of a window, from 2 to the model's context, which is the default.

    Raises:
        InputError: the text is empty, not UTF-8, or too short to be scored; ``n_context`` is out of range.
        ModelError: a logit is not finite.
        TokenizerError: the vocabulary cannot express the text.
    """
    limit = model.config.context_length
    n_context = limit if n_context is None else n_context
    if n_context > limit:
        raise InputError(f"windows of {n_context} tokens do not fit the model's context of {limit}")
    tokenizer = model.tokenizer
    vocabulary = tokenizer.vocabulary
    bos = vocabulary.bos_id if vocabulary.add_bos else None
    ids = tokenizer.encode(decoded(text), add_bos=False, parse_special=False)
    pieces = windows(ids, bos, n_context)
    cache = model.new_cache()
    found: list[float] = []
    for window in pieces:
        cache.reset()
        inputs = window.inputs
        for start in range(0, len(inputs), model.n_ubatch):
            part = inputs[start : start + model.n_ubatch]
            rows = model.forward(part, cache, logits="all").logits
            assert rows is not None
            targets = window.scored[start : start + len(part)]
            found += [negative_log_likelihood(row, target) for row, target in zip(rows, targets, strict=True)]
    return Score(np.array(found), scored_bytes(text, ids, bos, tokenizer), len(pieces), n_context)


def decoded(text: bytes) -> str:
    """Return a text in UTF-8 as a string, nothing removed.

    Raises:
        InputError: it is empty or not UTF-8.
    """
    if not text:
        raise InputError("the text is empty: there is nothing to score")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is not UTF-8 at byte {error.start}: convert it first") from error


def windows(ids: Sequence[int], bos: int | None, n_context: int) -> list[Window]:
    """Return the windows of a text's tokens, by the rule above; ``bos``: None without BOS.

    Raises:
        InputError: no token can be scored, or ``n_context`` is less than 2.
    """
    if n_context < MIN_CONTEXT:
        raise InputError(f"a window has at least {MIN_CONTEXT} tokens, not {n_context}")
    if not ids:
        raise InputError("the text has no tokens: there is nothing to score")
    if bos is None and len(ids) == 1:
        raise InputError(
            "the text is one token and the vocabulary adds no BOS: nothing precedes it, score more text"
        )
    return list(_cut(ids, bos, n_context - 1))


def _cut(ids: Sequence[int], bos: int | None, n_scored: int) -> Iterator[Window]:
    for start in range(0 if bos is not None else 1, len(ids), n_scored):
        yield Window(ids[start - 1] if bos is None else bos, tuple(ids[start : start + n_scored]))


def scored_bytes(text: bytes, ids: Sequence[int], bos: int | None, tokenizer: Tokenizer) -> int:
    """Return how many bytes of a text the scored tokens stand for: all, or without BOS those after its first."""
    if bos is not None:
        return len(text)
    # A space that the tokenizer puts before the text belongs to the first token, so it is not counted.
    return min(len(text), len(tokenizer.decode_bytes(ids[1:], skip_special=False)))


def negative_log_likelihood(logits: npt.NDArray[np.float32], token_id: int) -> float:
    """Return ``log(sum(exp(logits))) - logits[token_id]`` in nats, in binary64 with the maximum taken out.

    Raises:
        ModelError: a logit is not finite.
    """
    check_logits(logits)
    row = logits.astype(np.float64)
    largest = float(row.max())
    return largest + math.log(float(np.exp(row - largest).sum())) - float(row[token_id])


def perplexity(mean_nll: float) -> float:
    """Return ``exp(mean_nll)``, infinite where binary64 ends."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
