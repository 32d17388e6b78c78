"""In which order were a file's ternary codes packed? A statistical test that needs nothing but the file.

In trained models the share of weights that are not 0 differs from column to column, and goes with
the norm weight that the column's input was multiplied by. Norms are never packed. So under the
right layout the two are correlated, and under another, which moves columns around within blocks of
128, they are not.

The statistic of a matrix and a layout is ``z``: the rank correlation, within blocks of 128 columns,
of the columns' shares of nonzero codes with the norm's weights, in standard deviations of what
columns in random order would give (permutation distribution: mean 0, variance 1 / sum(n - 1) over
the blocks; close to normal). The statistic of a file is the mean of z**2 over its matrices.

A layout is established when its mean is at least ``MIN_MEAN`` and every other layout's is at most
``MAX_SHARE`` of it. Matrices of one model depend on each other, so the bound holds for any
dependence: exp is convex, so for normal z, P(mean z**2 >= t) <= E exp(0.45 (z**2 - t)) = exp(-0.45
t) / sqrt(0.1), which is 5e-8 at t = 40. Random weights, and models whose norms are all alike,
establish none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from bitnet_py.config import I2_S_BLOCK

MIN_MEAN = 40.0
MAX_SHARE = 0.5
FOUR_ROWS = "four rows in a byte"
"""Weights of four rows in each byte, in any order of rows and bits: they have the same columns."""

NORM_OF: Mapping[str, str] = MappingProxyType(
    {
        "attn_q": "attn_norm",
        "attn_k": "attn_norm",
        "attn_v": "attn_norm",
        "attn_output": "attn_sub_norm",
        "ffn_gate": "ffn_norm",
        "ffn_up": "ffn_norm",
        "ffn_down": "ffn_sub_norm",
    }
)
"""Matrix -> norm whose output it multiplies."""


def column_shares(packed: npt.NDArray[np.uint8], rows: int, cols: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return by layout how many codes of each column are not 1 (weight 0), ``(cols,)``.

    A layout that a matrix cannot have gives zeros, which go with nothing.
    """
    shape = (rows, cols // I2_S_BLOCK, I2_S_BLOCK // 4)
    by_shift = {s: np.count_nonzero((packed >> s & 3).reshape(shape) != 1, axis=0) for s in (6, 4, 2, 0)}
    high = np.stack(list(by_shift.values()))  # (4 shifts, blocks, 32 bytes)
    halves = high.reshape(4, -1, 2, I2_S_BLOCK // 8)
    found = {
        "i2_s": high.transpose(1, 0, 2),
        "sequential": high.transpose(1, 2, 0),
        "sequential, low bits first": high[::-1].transpose(1, 2, 0),
        "blocks of 64": halves.transpose(1, 2, 0, 3),
        "strides reversed": high[::-1].transpose(1, 0, 2),
    }
    shares = {name: counts.reshape(-1).astype(np.float64) for name, counts in found.items()}
    quads = _NONZERO[packed[: rows // 4 * cols]].reshape(rows // 4, cols)
    shares[FOUR_ROWS] = quads.sum(0, dtype=np.int64).astype(np.float64) if rows % 4 == 0 else np.zeros(cols)
    return shares


def correlations(shares: Mapping[str, npt.NDArray[np.float64]], norm: npt.NDArray[np.float32]) -> dict[str, float]:
    """Return z by layout: rank correlation with a norm within blocks, in standard deviations; 0 of constants."""
    second = _ranks(norm)
    n_free = norm.size - norm.size // I2_S_BLOCK
    found = {}
    for name, counts in shares.items():
        first = _ranks(counts)
        size = math.sqrt(float(first @ first) * float(second @ second))
        found[name] = float(first @ second) / size * math.sqrt(n_free) if size else 0.0
    return found


def means(matrices: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of z**2 of every layout, from the z of each matrix by layout; nothing of no matrix."""
    known = list(matrices)
    names = known[0] if known else ()
    return {name: math.fsum(one[name] ** 2 for one in known) / len(known) for name in names}


def established(matrices: Iterable[Mapping[str, float]]) -> str | None:
    """Return the layout that the matrices of a file show, or None: undetermined."""
    found = means(matrices)
    best = max(found, key=lambda name: found[name], default=None)
    if best is None or found[best] < MIN_MEAN:
        return None
    others = [value for name, value in found.items() if name != best]
    return best if max(others, default=0.0) <= MAX_SHARE * found[best] else None


def _ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return centred ranks within blocks, equal values sharing the mean of theirs."""
    out = np.empty(values.shape, np.float64)
    for start in range(0, values.size, I2_S_BLOCK):
        block = values[start : start + I2_S_BLOCK]
        _, inverse, counts = np.unique(block, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        out[start : start + I2_S_BLOCK] = (last - (counts - 1) / 2)[inverse.reshape(-1)]
        out[start : start + I2_S_BLOCK] -= (block.size + 1) / 2
    return out


_NONZERO = np.array([sum((byte >> s & 3) != 1 for s in (6, 4, 2, 0)) for byte in range(256)], np.uint8)
