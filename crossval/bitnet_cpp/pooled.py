"""The vector of a text as the programs of llama.cpp make it of what the library pools.

The library ends with the pooled vector. ``llama-embedding`` and the server divide it by its Euclidean norm
(``common_embd_normalize``, ``common/common.cpp``): squares in binary32, their sum one after the other in binary64,
its reciprocal root rounded to binary32.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp.capture import CapturedTap

POOLED = "pooled"
EMBEDDING = "embedding"
NOTE = "pooled divided by its norm here, as llama-embedding does: the library does not"


def normalised(pooled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the vector as ``llama-embedding`` normalises it, shape ``(dim,)``; of zeros zeros."""
    total = np.add.accumulate((pooled * pooled).astype(np.float64))[-1]
    norm = np.float32(1.0 / np.sqrt(total)) if total > 0 else np.float32(0)
    vector: npt.NDArray[np.float32] = pooled * norm
    return vector


def embedding_taps(
    pooled: npt.NDArray[np.float32], select: Collection[str], n_tokens: int
) -> dict[str, CapturedTap]:
    """Return those of both vectors that are selected, as rows of the last token."""
    found = {POOLED: pooled, EMBEDDING: normalised(pooled)}
    rows = (n_tokens - 1,)
    return {name: CapturedTap(array[None], rows) for name, array in found.items() if name in select}
