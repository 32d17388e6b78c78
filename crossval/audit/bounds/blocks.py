"""BitLinear over activations quantised in blocks of a row, each with a step of its own (llama.cpp's Q8_K).

Source: llama.cpp ``quantize_row_q8_K_ref`` and ``ggml_vec_dot_tq2_0_q8_K``. Of the 256 values of a block, ``m`` is
the one of largest magnitude; ``f = fl(-127 / m)``, codes ``rint(fl(f x))`` of at most 127, step ``d = fl(1 / f)``.
Every block gives exact integer sums, eight of them in the AVX2 kernel: lane ``l`` takes code + 1 times the values
at places ``4l .. 4l + 3`` modulo 32, less the values at places ``32l .. 32l + 31``. These are multiplied by
``fl(d w)`` and added up in binary32, block after block, then lane by lane. Kernels with fewer lanes add fewer
numbers of no larger magnitudes.

Codes and steps follow from the recorded input without doubt, so the bound has no allowance for the quantiser: only
for the product ``d w``, its product with a lane, ``n_blocks`` additions and three of the lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, U
from crossval.formats import to_f32
from crossval.model.kinds import FloatArray, TernaryMatrix

LEVELS = 127.0
LANES = 8
STEPS_BESIDE_BLOCKS = 2.0 + 3.0
"""Roundings of a lane's sum that do not depend on the number of blocks: two products, three sums of lanes."""


@dataclass(frozen=True)
class Blocks:
    """Quantised activations, float64 ``(n_tokens, n_blocks, block)``; steps ``(n_tokens, n_blocks, 1)``."""

    codes: FloatArray
    """Integers."""
    steps: FloatArray
    """What one unit of a code stands for; its sign is opposite to that of the block's largest value."""
    scaled: FloatArray
    """Before rounding to integers."""

    @property
    def values(self) -> FloatArray:
        """Return what is multiplied with the weights, ``(n_tokens, n_blocks * block)``."""
        return (self.codes * self.steps).reshape(len(self.codes), -1)


def is_blocked(arithmetic: Arithmetic, n_values: int) -> bool:
    """Return whether an engine states that it quantises rows of so many values in blocks."""
    block = arithmetic.numerics.quantizer_block
    return block is not None and n_values % block == 0


def quantize(x: npt.NDArray[np.floating[Any]], arithmetic: Arithmetic) -> Blocks:
    """Quantise rows ``(n_tokens, n_values)`` as the engine states that it does."""
    block = arithmetic.numerics.quantizer_block
    assert block is not None
    wide = x.astype(np.float64).reshape(len(x), -1, block)
    largest = np.take_along_axis(wide, np.abs(wide).argmax(axis=-1)[..., None], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = to_f32(-LEVELS / largest)
        scaled = wide * factor  # two binary32 factors: exact in binary64
        if not arithmetic.numerics.fused_quantizer:
            scaled = to_f32(scaled)
        codes, steps = np.minimum(np.rint(scaled), LEVELS), to_f32(1.0 / factor)
    nothing = largest == 0
    return Blocks(np.where(nothing, 0.0, codes), np.where(nothing, 0.0, steps), np.where(nothing, 0.0, scaled))


def multiply(blocks: Blocks, weight: TernaryMatrix) -> tuple[FloatArray, FloatArray]:
    """Return the product with a matrix, ``(n_tokens, rows)``, and how far roundings may take a result from it."""
    signs = weight.signs.T.astype(np.float64)
    product = blocks.values @ signs * weight.scale
    steps, magnitudes = np.abs(blocks.steps), np.abs(blocks.codes)
    n_tokens, n_blocks = blocks.codes.shape[:2]
    groups = np.abs(blocks.codes.reshape(n_tokens, n_blocks, LANES, -1).sum(axis=-1))
    lanes = (magnitudes * steps).reshape(n_tokens, -1) @ (signs + 1.0) + (groups * steps).sum(axis=(1, 2))[:, None]
    allowed = (n_blocks + STEPS_BESIDE_BLOCKS) * U * SECOND_ORDER * lanes * weight.scale + TINY * n_blocks
    return product, allowed
