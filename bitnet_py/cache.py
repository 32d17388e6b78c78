"""The KV cache: keys and values of the tokens seen so far, in binary16 as bitnet.cpp keeps them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_py.arithmetic import MARCH, Arithmetic
from bitnet_py.config import ModelConfig

_FIRST_CAPACITY = 256


class KVCache:
    """Keys ``(n_layers, capacity, kv_dim)`` and values ``(n_layers, kv_dim, capacity)``, grown as needed.

    With flash attention, values are stored like keys. Cells that hold no token are zero, so that
    reading them in a padded group adds nothing.
    """

    def __init__(self, config: ModelConfig, arithmetic: Arithmetic = MARCH) -> None:
        self._config = config
        self._cell_multiple = arithmetic.cell_multiple
        self._values_by_cell = arithmetic.flash_attention
        self.n_tokens = 0
        self.keys: npt.NDArray[np.uint16]
        self.values: npt.NDArray[np.uint16]
        self._allocate(0)

    @property
    def capacity(self) -> int:
        """Number of cells allocated now."""
        return int(self.keys.shape[1])

    @property
    def size_bytes(self) -> int:
        """Memory held now, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def _allocate(self, capacity: int) -> None:
        layers, kv_dim = self._config.n_layers, self._config.kv_dim
        self.keys = np.zeros((layers, capacity, kv_dim), np.uint16)
        shape = (layers, capacity, kv_dim) if self._values_by_cell else (layers, kv_dim, capacity)
        self.values = np.zeros(shape, np.uint16)

    def reserve(self, n_tokens: int) -> None:
        """Make room for a total of ``n_tokens`` tokens, keeping what is stored."""
        if n_tokens <= self.capacity:
            return
        capacity = max(self.capacity, _FIRST_CAPACITY)
        while capacity < n_tokens:
            capacity *= 2
        # The transposed values are read with a stride of the capacity: a power of two makes them
        # collide in the processor's caches, one more group of cells does not.
        capacity += self._cell_multiple
        keys, values, used = self.keys, self.values, self.n_tokens
        self._allocate(capacity)
        self.keys[:, :used] = keys[:, :used]
        self._used(self.values)[...] = self._used(values)

    def reset(self) -> None:
        """Forget all tokens; memory stays allocated."""
        self.keys[:, : self.n_tokens] = 0
        self._used(self.values)[...] = 0
        self.n_tokens = 0

    def _used(self, values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        return values[:, : self.n_tokens] if self._values_by_cell else values[:, :, : self.n_tokens]
