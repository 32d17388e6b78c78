"""What is too large for an engine's format: infinities, and what turned to zeros because it was divided by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import Arithmetic
from crossval.formats import F16, F32, Format
from crossval.model.kinds import FloatArray, RmsNorm, quantize_activations
from crossval.model.op import Op


def of_results(recorded: npt.NDArray[np.float32], expected: FloatArray) -> str | None:
    """Say that infinities are where the expected value exceeds a format's largest; None where they are not."""
    if recorded.shape != expected.shape:
        return None
    infinite = np.isinf(recorded)
    if not infinite.any():
        return None
    least, most = float(np.abs(expected[infinite]).min()), float(np.abs(expected[infinite]).max())
    for form in (F32, F16):
        if least >= form.largest * (1 - 4 * form.unit_roundoff):
            n_bad = int(np.count_nonzero(~np.isfinite(recorded)))
            return (
                f"{n_bad} of {recorded.size} values are not finite: overflow of {form.label}, expected up to "
                f"{most:.3g}, the largest it holds is {form.largest:.6g}"
            )
    return None


def inside_norm(
    op: Op,
    inputs: Sequence[npt.NDArray[Any]],
    recorded: npt.NDArray[np.float32],
    wrong: npt.NDArray[np.bool_],
    arithmetic: Arithmetic,
) -> str | None:
    """Say that a norm's squares exceed the engine's format; None where that does not explain all that is wrong.

    ``wrong``: elements outside their bound, shaped as ``recorded``.
    """
    if not isinstance(op.kind, RmsNorm):
        return None
    squares = np.asarray(inputs[0], np.float64) ** 2
    return _divided_by_infinity(squares, recorded, wrong, arithmetic.format, "the square of an input")


def of_scales(
    x: npt.NDArray[np.float32],
    scale: float,
    recorded: npt.NDArray[np.float32],
    wrong: npt.NDArray[np.bool_],
    arithmetic: Arithmetic,
) -> str | None:
    """Say the same of a BitLinear's scales; ``scale``: the weight's."""
    _, step = quantize_activations(x.astype(np.float64))
    scales = np.maximum(step, np.maximum(step, 1.0) / scale)
    what = "a scale (127 / max|x|, or that over the weight's)"
    return _divided_by_infinity(scales, recorded, wrong, arithmetic.format, what)


def _divided_by_infinity(
    values: FloatArray, recorded: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_], form: Format, what: str
) -> str | None:
    """Say what is too large where the tokens with such a value, and no others, are zero, and no others are wrong.

    They were divided by infinity. A token that is right may be zero as well: its input is.
    """
    beyond, off = np.isinf(form.round(values)).any(axis=-1), wrong.any(axis=-1)
    if not off.any() or (off & ~beyond).any() or not np.array_equal(beyond, (recorded == 0).all(axis=-1)):
        return None
    return (
        f"overflow of {form.label} inside: at {int(off.sum())} of {beyond.size} tokens {what} is too large, up "
        f"to {float(values.max()):.3g}; the largest it holds is {form.largest:.6g}"
    )
