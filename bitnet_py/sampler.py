"""Choose the next token from logits: greedy, or temperature with top-k, top-p and a seed."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import InputError, ModelError

MAX_SEED = 2**64 - 1


class Sampler(Protocol):
    """What chooses tokens; may hold state (a random generator)."""

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the id chosen from ``logits`` (vocab_size,). Raises ``ModelError`` when one is not finite."""


class GreedySampler:
    """Takes the largest logit; of equal ones the lowest id, as ``llama_sampler_greedy_apply`` does."""

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the id of the largest logit, of (vocab_size,). Raises ``ModelError`` when one is not finite."""
        check_logits(logits)
        return int(np.argmax(logits))


class RandomSampler:
    """Draws from the softmax after top-k, then top-p, then temperature: the order of bitnet.cpp's sampler chain.

    The same seed, settings and logits give the same tokens (PCG64, one draw per token). Of equal logits the lower
    id counts as larger.
    """

    def __init__(self, *, temperature: float = 0.8, top_k: int = 40, top_p: float = 0.95, seed: int | None = None):
        """Check and keep the settings; ``seed`` None draws one, readable as ``.seed``.

        ``temperature`` > 0; ``top_k`` 0 keeps all tokens; ``top_p`` in (0, 1], 1 keeps all; ``seed`` 0..2**64-1.
        Raises ``InputError`` for a value outside its range.
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(
                f"temperature is {temperature}, expected a number above 0 (for no randomness, sample greedily)"
            )
        if top_k < 0:
            raise InputError(f"top-k is {top_k}, expected 0 (all tokens) or more")
        if not 0 < top_p <= 1:
            raise InputError(f"top-p is {top_p}, expected a number above 0, at most 1")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed is {seed}, expected 0 to {MAX_SEED}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return one id drawn from ``logits`` (vocab_size,). Raises ``ModelError`` when one is not finite."""
        check_logits(logits)
        ids = _largest(logits, self.top_k)
        values = logits[ids].astype(np.float64)
        if self.top_p < 1:
            cumulative = np.cumsum(_softmax(values))
            # The token that reaches top_p is kept (llama_sampler_top_p_apply).
            n_kept = int(np.searchsorted(cumulative, self.top_p)) + 1
            ids, values = ids[:n_kept], values[:n_kept]
        cumulative = np.cumsum(_softmax(values / self.temperature))
        draw = self._random.random() * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, draw, side="right")), len(ids) - 1)])


def check_logits(logits: npt.NDArray[np.float32]) -> None:
    """Raise ``ModelError`` unless ``logits`` is one row, not empty, of finite values."""
    if logits.ndim != 1 or logits.size == 0:
        raise ModelError(f"logits have shape {logits.shape}, expected one row (vocab_size,)")
    finite = np.isfinite(logits)
    if not finite.all():
        first = int(np.argmin(finite))
        n_bad = int(logits.size - np.count_nonzero(finite))
        raise ModelError(
            f"{n_bad} of {logits.size} logits are not finite (first: token {first} is {logits[first]}); "
            "check the weights with `bitnet inspect --verify`"
        )


def _largest(logits: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.intp]:
    """Return the ids of the ``top_k`` largest logits (0: all), largest first, lower id first among equals."""
    if 0 < top_k < logits.size:
        threshold = np.partition(logits, logits.size - top_k)[logits.size - top_k]
        candidates = np.flatnonzero(logits >= threshold)
        return candidates[np.argsort(-logits[candidates], kind="stable")][:top_k]
    return np.argsort(-logits, kind="stable")


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the softmax of ``values``, largest first."""
    exponentials = np.exp(values - values[0])
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities
