"""The token loop: evaluates the prompt once, then only the newest token per step, and yields each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import InputError
from bitnet_py.sampler import Sampler

FinishReason = Literal["stop", "max_tokens", "context"]


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    all_logits: Callable[[], npt.NDArray[np.float32]]
    """Returns the logits it was chosen from, ``(vocab_size,)``; only until the next token is
    requested."""
    elapsed_s: float
    """Time to evaluate and choose: for the first token, including the whole prompt."""
    finish: FinishReason | None
    """Why generation ends with this token, or None."""


class _Config(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


class _Largest(Protocol):
    @property
    def ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def logits(self) -> npt.NDArray[np.float32]: ...
    @property
    def all_logits(self) -> Callable[[], npt.NDArray[np.float32]]: ...


class LanguageModel(Protocol):
    """What generation needs of a model (``bitnet_py.model.Model``)."""

    @property
    def config(self) -> _Config:
        """Shape of the model."""

    def new_cache(self) -> Any:
        """Return an empty KV cache."""

    def largest(self, ids: Sequence[int], cache: Any, n: int) -> _Largest:
        """Append ``ids`` to ``cache`` and return the ``n`` largest logits of the last one (0: all)."""


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    stop_ids: Collection[int] = frozenset(),
) -> Iterator[Token]:
    """Generate up to ``max_tokens`` tokens after ``prompt_ids``, one forward pass per step of the iterator.

    Ends after a token of ``stop_ids`` (it is part of the output), after ``max_tokens``, or when the
    context is full; the last token's ``finish`` says which. The arguments are checked at the call,
    not at the first step. Raises ``InputError`` for an empty prompt, one longer than the context,
    an id outside the vocabulary or ``max_tokens`` below 1; ``ModelError`` for logits that are not
    finite.
    """
    check_prompt(prompt_ids, model.config)
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}, expected 1 or more")
    return _steps(model, list(prompt_ids), max_tokens, sampler, frozenset(stop_ids))


def check_prompt(prompt_ids: Sequence[int], config: _Config) -> None:
    """Raise ``InputError`` unless ``prompt_ids`` can be evaluated by a model of ``config``."""
    if len(prompt_ids) == 0:
        raise InputError("the prompt is empty; give at least one token")
    if len(prompt_ids) > config.context_length:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens, the model's context {config.context_length}")
    for position, token_id in enumerate(prompt_ids):
        if not 0 <= token_id < config.vocab_size:
            raise InputError(
                f"token {position} of the prompt has id {token_id}, "
                f"outside the model's vocabulary of {config.vocab_size} tokens"
            )


def _steps(
    model: LanguageModel, prompt_ids: list[int], max_tokens: int, sampler: Sampler, stop_ids: frozenset[int]
) -> Iterator[Token]:
    cache = model.new_cache()
    pending, n_context = prompt_ids, len(prompt_ids)
    for n_made in range(1, max_tokens + 1):
        start_s = time.perf_counter()
        found = model.largest(pending, cache, sampler.n_candidates)
        token_id = sampler.choose(found.ids, found.logits)
        elapsed_s = time.perf_counter() - start_s
        finish: FinishReason | None = None
        if token_id in stop_ids:
            finish = "stop"
        elif n_made == max_tokens:
            finish = "max_tokens"
        elif n_context == model.config.context_length:
            finish = "context"
        yield Token(token_id, found.all_logits, elapsed_s, finish)
        if finish:
            return
        pending, n_context = [token_id], n_context + 1
