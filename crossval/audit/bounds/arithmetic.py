"""What is known about how an engine rounds, and which inputs of an operation it may round first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.quantised import QUANTISERS, Quantiser
from crossval.formats import F16, F32, FORMATS, Dtype, Format
from crossval.model.kinds import FloatArray, widen
from crossval.model.op import Op
from crossval.passes import Numerics

U = F32.unit_roundoff
"""Largest relative error of one rounding to binary32."""
U16 = F16.unit_roundoff
"""The same for binary16."""
TINY = F32.tiny
"""Smallest binary32 above zero: what underflow may lose."""
SECOND_ORDER = 1.02

Array = npt.NDArray[Any]
Sums = Literal["lanes", "binary16 lanes", "cells", "binary16 cells", "divided binary16 cells"]
"""How a sum of products is carried (docs/audit.md): in several accumulators, binary32 or binary16. In flash
attention key after key: in binary32; or in binary16, rescaled at every new maximum, by one thread or several."""
Rounding = Dtype | Quantiser
"""What an input may be rounded to before an operation reads it."""
TILED_TOKENS = 64
"""Tokens of a pass from which on flash attention works in tiles, in binary32."""


@dataclass(frozen=True)
class Arithmetic:
    """What is known about how an engine rounds."""

    numerics: Numerics
    n_heads: int
    """A single head takes another code path in bitnet.cpp."""
    recorded: Format = F32
    """What was recorded is in this format although the engine computes with more digits."""
    head_dim: int = 0
    """Flash attention works in tiles only if its lanes divide it."""
    head_table: str = "F16"
    """ggml's name of the type of the LM head, which decides how bitnet.cpp rounds its input."""
    sums: Sums = "lanes"
    """Of the operation that is judged."""
    zero_rows_nan: bool = False
    """Whether NaN for an all-zero activation row, and what follows from it, is left unjudged."""
    written: Format | None = None
    """The output that is judged was stored in this format; None: in ``recorded``."""
    mixed: bool = False
    """Whether operations compute in several formats, so that one may read more digits than it computes with."""

    def of(self, op: Op) -> Arithmetic:
        """Return the arithmetic of one operation: the format stated for it, for its kind, or for all."""
        stated = dict(self.numerics.op_dtypes)
        if not stated:
            return self
        dtype = stated.get(op.name, stated.get(op.kind_name, self.numerics.compute_dtype))
        return replace(self, numerics=replace(self.numerics, compute_dtype=dtype, op_dtypes=()), mixed=True)

    def storing(self, inputs: Format, output: Format) -> Arithmetic:
        """Return the arithmetic of an operation whose tensors were stored with fewer digits than computed."""
        if self.recorded is not F32 or (inputs is F32 and output is F32):
            return self
        return replace(self, recorded=inputs, written=output)

    @property
    def lost(self) -> Format:
        """What the output was stored in, where that has fewer digits than it was computed with."""
        return self.recorded if self.written is None else self.written

    @property
    def known(self) -> bool:
        """Whether the engine states that it rounds as bitnet.cpp's family does, which is in binary32."""
        stated = self.numerics.simd_width is not None and self.numerics.fused_quantizer is not None
        return stated and not self.low

    @property
    def is_main(self) -> bool:
        """Whether it is known to be that of bitnet.cpp's main since July 2026, or mainline's: the same."""
        return self.known and self.numerics.generation in ("main", "mainline")

    def is_tiled(self, n_tokens: int) -> bool:
        """Return whether flash attention works in tiles in a pass of so many tokens."""
        return n_tokens >= TILED_TOKENS and self.head_dim % (self.numerics.simd_width or 1) == 0

    def reading(self, reading: Reading | None) -> Arithmetic:
        """Return the arithmetic of an operation that is read in this way."""
        return self if reading is None or reading.sums == self.sums else replace(self, sums=reading.sums)

    @property
    def format(self) -> Format:
        """What tensors and elementwise steps are rounded to."""
        return FORMATS[self.numerics.compute_dtype or "f32"]

    @property
    def low(self) -> bool:
        """Whether that is a 16-bit format."""
        return self.format is not F32

    @property
    def carried(self) -> float:
        """Roundings of two factors and of their sum, where an engine may carry more digits than it records."""
        return 0.0 if self.known or self.low else 3.0

    def sum_steps(self, n: int) -> float:
        """Return the roundings that one term of a sum of ``n`` may pass through."""
        width = self.numerics.simd_width
        if self.sums == "cells":
            return 2.0 * n  # each addition, and a rescaling before it
        # bitnet.cpp: one accumulator of W lanes and a tree at worst (llamafile sgemm); four in ggml_vec_dot_f16
        return n / width + np.log2(width) + 3 if width else float(n)

    def stored(self, exact: FloatArray) -> FloatArray | float:
        """Return what the rounding of a binary32 result to 16-bit formats may change; nothing in binary32."""
        forms = [form for form in (self.format, self.lost) if form is not F32]
        return sum((form.unit_roundoff * np.abs(exact) + form.tiny for form in forms), 0.0)

    def cached(self, op: Op, exact: FloatArray, recorded: Array) -> FloatArray | float:
        """Return what the stated format of keys and values may change of them, where they were recorded in it."""
        kv = FORMATS[self.numerics.kv_dtype or "f32"]
        if op.appends_to is None or kv is F32 or not kv.holds(recorded):
            return 0.0
        return kv.unit_roundoff * SECOND_ORDER * np.abs(exact) + kv.tiny


@dataclass(frozen=True)
class Reading:
    """One allowed choice of which inputs of an operation are rounded to a 16-bit format, or quantised, first."""

    name: str
    rounded: tuple[Rounding | None, ...]
    """For each array input: what to; None: it is read as it was recorded."""
    sums: Sums = "lanes"

    def apply(self, index: int, array: Array) -> Array:
        """Return an input as the operation reads it, float64; integers as they are."""
        return read_as(self.rounded[index] if array.dtype.kind == "f" else None, array)


def read_as(rounding: Rounding | None, array: Array) -> Array:
    """Return an array in float64, rounded or quantised first unless that is None; integers as they are."""
    return widen(array) if rounding is None else round_by(rounding, array)


def round_by(rounding: Rounding, array: Array) -> FloatArray:
    """Return an array rounded to a 16-bit format, or the codes times steps of its rows."""
    quantiser = QUANTISERS.get(rounding)
    return FORMATS[rounding].round(array) if quantiser is None else quantiser(array)
