"""What is shared by all fits of a matrix product: the sums an engine must have had, and how a fit is named."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import near_ties
from crossval.model.kinds import FloatArray, IntArray

CLOSE = 1e-3
"""Relative distance on a few values below which a fit is worth checking on all of them."""
MOST = 8
"""Fits of one kind that are checked on all tokens."""


@dataclass(frozen=True)
class Fit:
    """A mistake whose parameters were estimated from what was recorded; the name states them."""

    name: str
    sentence: str
    data: Any
    group: str = ""


def recorded_sums(context: Context, scale: Array | float) -> FloatArray:
    """Return the sums over the inputs that the recorded output stands for: ``(n_rows, features)``.

    Raises:
        Inapplicable: some values are not finite, or all are zero.
    """
    target = context.target
    if not np.isfinite(target).all() or not target.any():
        raise Inapplicable
    return target * scale / context.matrix.scale


def settled(context: Context) -> Context:
    """Return a product without the tokens whose codes depend on how an engine rounds, if others are left."""
    near = near_ties(context)
    return context.of_tokens(~near) if near.any() and not near.all() else context


def probe(context: Context, n_features: int) -> IntArray:
    """Return some of the output features looked at, spread evenly."""
    have = np.arange(context.recorded[0].size) if context.features is None else context.features
    return have[np.unique(np.linspace(0, have.size - 1, n_features).astype(np.int64))]


def distance(recorded: Array, computed: Array) -> float:
    """Return the relative L2 distance of two arrays."""
    size = float(np.linalg.norm(recorded))
    return float(np.linalg.norm(recorded - computed)) / size if size else np.inf


def snapped(value: float, near: float = 2e-4) -> float:
    """Return the integer, simple fraction or two-place decimal that a fitted number stands for, or six digits."""
    for denominator in (1, 2, 3, 4, 100):
        whole = round(value * denominator) / denominator
        if abs(value - whole) <= near * max(1.0, abs(value)):
            return whole
    return float(f"{value:.6g}")
