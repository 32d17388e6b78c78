"""NaN that a generation is known to make of all-zero activation rows: set aside, with everything that reads it.

Only in audits that follow the reference's graph (``crossval.model.reference_graph``). Nothing is claimed about
what is set aside: the operation counts as not judged.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crossval.audit.state import Output, Value
from crossval.model.kinds import BitLinear
from crossval.model.taps import is_state, take_rows, token_axis
from crossval.passes import TapArray

WHY = "NaN of an all-zero activation row, as the reference's graph has it"


def set_aside(output: Output) -> tuple[Output | None, int]:
    """Return an output without the tokens whose NaN is accepted, None if that is all; and how many they are."""
    axis = output.op.token_axis
    if output.array.ndim <= axis or output.array.shape[axis] != len(output.rows):
        return output, 0
    wrong = _rows_with_nan(output.array, axis)
    if not wrong.any():
        return output, 0
    excused = wrong & _may_be_nan(output)
    kept = [row for row, gone in zip(output.rows, excused, strict=True) if not gone]
    if not kept:
        return None, len(output.rows)
    array = take_rows(output.op.output, output.array, output.rows, kept)
    return replace(output, tap=TapArray(array, tuple(kept))), int(excused.sum())


def _rows_with_nan(array: np.ndarray, axis: int) -> np.ndarray:
    found: np.ndarray = np.isnan(array).any(axis=tuple(i for i in range(array.ndim) if i != axis))
    return found


def _may_be_nan(output: Output) -> np.ndarray:
    """Return which tokens read an all-zero row to be quantised, or NaN: their own, or any in the cache."""
    found = np.zeros(len(output.rows), np.bool_)
    for name in output.op.inputs:
        value = output.state.value(name)
        if not isinstance(value, Value) or value.array.dtype.kind != "f":
            continue
        if is_state(name):
            found |= bool(np.isnan(value.array).any())  # 0 times NaN: what the mask hides, too
            continue
        if not set(output.rows) <= set(value.rows):
            continue
        array = take_rows(name, value.array, value.rows, output.rows)
        found |= _rows_with_nan(array, token_axis(name))
        if isinstance(output.op.kind, BitLinear):
            found |= ~array.reshape(len(array), -1).any(axis=-1)
    return found
