"""Check one row of logits, and find its largest values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import ModelError


def check_logits(logits: npt.NDArray[np.float32], ids: npt.NDArray[np.integer] | None = None) -> None:
    """Raise ``ModelError`` unless ``logits`` is one non-empty row of finite values.

    ``ids``: their tokens; None: all tokens in order.
    """
    if logits.ndim != 1 or logits.size == 0:
        raise ModelError(f"logits have shape {logits.shape}, expected one row (vocab_size,)")
    finite = np.isfinite(logits)
    if not finite.all():
        first = int(np.argmin(finite))
        token = first if ids is None else int(ids[first])
        n_bad = int(logits.size - np.count_nonzero(finite))
        raise ModelError(
            f"{n_bad} of {logits.size} logits are not finite (first: token {token} is {logits[first]}); "
            "check the weights with `bitnet inspect --verify`"
        )


def largest(logits: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.intp]:
    """Return the ids of the ``n`` largest logits (0: all), largest first; ties by lower id."""
    if n == 1:
        return np.array([np.argmax(logits)])
    if 0 < n < logits.size:
        threshold = np.partition(logits, logits.size - n)[logits.size - n]
        candidates = np.flatnonzero(logits >= threshold)
        return candidates[np.argsort(-logits[candidates], kind="stable")][:n]
    return np.argsort(-logits, kind="stable")
