"""Floating-point formats that engines compute and store in: unit roundoff, range, and rounding to them.

A format of ``p`` significant bits has neighbours ``2^(1-p)`` apart above 1, so one rounding to nearest is off by
at most ``2^-p`` of the value (the unit roundoff); below the smallest normal number the spacing is constant, and
a rounding is off by at most half the smallest subnormal, whatever the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Dtype = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True)
class Format:
    """One format."""

    name: Dtype
    label: str
    """In sentences."""
    unit_roundoff: float
    tiny: float
    """Half of the smallest subnormal: error bound of one rounding where the relative bound does not apply."""
    largest: float
    round: Callable[[npt.NDArray[Any]], FloatArray]
    """Round to nearest, ties to even, and widen to float64; values out of range become infinite."""
    keeps: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]
    """Which finite values are representable in it; of NaN and infinities, anything."""

    def holds(self, array: npt.NDArray[np.floating[Any]]) -> bool:
        """Return whether every value is representable in this format; NaN and infinities always are."""
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32, copy=False)
        kept = self.keeps(narrow) if narrow is array else self.keeps(narrow) & (narrow == array)
        return bool(kept.all() or (kept | ~np.isfinite(array)).all())


def to_f32(x: npt.NDArray[Any]) -> FloatArray:
    """Round to binary32 and widen again."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float64)


def to_f16(x: npt.NDArray[Any]) -> FloatArray:
    """Round to binary16 (through binary32, as engines do) and widen again."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float16).astype(np.float64)


def to_bf16(x: npt.NDArray[Any]) -> FloatArray:
    """Round to bfloat16 (through binary32, as engines do) and widen again."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = np.ascontiguousarray(x, dtype=np.float32)
        bits = narrow.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        wide = (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        return np.where(np.isfinite(narrow), wide, narrow.astype(np.float64))


def _in_f32(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return np.ones(array.shape, np.bool_)


def _in_f16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    with np.errstate(over="ignore", invalid="ignore"):
        kept: npt.NDArray[np.bool_] = array.astype(np.float16) == array
    return kept


def _in_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """bfloat16 is the upper half of binary32."""
    kept: npt.NDArray[np.bool_] = (array.view(np.uint32) & np.uint32(0xFFFF)) == 0
    return kept


F32 = Format("f32", "binary32", 2.0**-24, 2.0**-149, float(np.finfo(np.float32).max), to_f32, _in_f32)
# binary32: the whole smallest subnormal, because engines that flush to zero may differ by as much.
F16 = Format("f16", "binary16 (F16)", 2.0**-11, 2.0**-25, 65504.0, to_f16, _in_f16)
BF16 = Format("bf16", "bfloat16", 2.0**-8, 2.0**-134, 2.0**128 - 2.0**120, to_bf16, _in_bf16)
FORMATS: dict[str, Format] = {one.name: one for one in (F32, F16, BF16)}
