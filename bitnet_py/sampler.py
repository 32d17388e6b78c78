"""Choose the next token from logits: greedy, or temperature with top-k, top-p and a seed."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import InputError

MAX_SEED = 2**64 - 1


class Sampler(Protocol):
    """Chooses tokens; may hold state (a random generator)."""

    @property
    def n_candidates(self) -> int:
        """Number of largest logits that it chooses from; 0: all."""

    def choose(self, ids: npt.NDArray[np.integer], logits: npt.NDArray[np.float32]) -> int:
        """Return the id chosen from the ``n_candidates`` largest logits, ordered as ``Model.largest`` does."""


class GreedySampler:
    """Takes the largest logit, ties by lowest id, as ``llama_sampler_greedy_apply`` does."""

    n_candidates = 1

    def choose(self, ids: npt.NDArray[np.integer], logits: npt.NDArray[np.float32]) -> int:
        """Return the first id."""
        return int(ids[0])


class RandomSampler:
    """Draws from the softmax after top-k, then top-p, then temperature: the order of bitnet.cpp's sampler chain.

    The same seed, settings and logits give the same tokens (PCG64, one draw per token). Of equal
    logits the lower id counts as larger.
    """

    def __init__(self, *, temperature: float = 0.8, top_k: int = 40, top_p: float = 0.95, seed: int | None = None):
        """Check and keep the settings; ``seed`` None draws one, readable as ``.seed``.

        ``temperature`` > 0; ``top_k`` 0 keeps all tokens; ``top_p`` in (0, 1], 1 keeps all;
        ``seed`` 0..2**64-1. Raises ``InputError`` for a value outside its range.
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

    @property
    def n_candidates(self) -> int:
        """``top_k``."""
        return self.top_k

    def choose(self, ids: npt.NDArray[np.integer], logits: npt.NDArray[np.float32]) -> int:
        """Return one id drawn from the largest logits, ordered as ``Sampler.choose`` says."""
        values = logits.astype(np.float64)
        if self.top_p < 1:
            cumulative = np.cumsum(_softmax(values))
            # The token that reaches top_p is kept (llama_sampler_top_p_apply).
            n_kept = int(np.searchsorted(cumulative, self.top_p)) + 1
            ids, values = ids[:n_kept], values[:n_kept]
        cumulative = np.cumsum(_softmax(values / self.temperature))
        draw = self._random.random() * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, draw, side="right")), len(ids) - 1)])


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the softmax of ``values``, largest first."""
    exponentials = np.exp(values - values[0])
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities
