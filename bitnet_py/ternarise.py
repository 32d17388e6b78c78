"""Weights of a checkpoint as ternary codes and a scale: absmean, and packed matrices with their ``weight_scale``.

A packed matrix (uint8, four quarters of the rows per byte) has a ``weight_scale`` in one of two
conventions (transformers ``integrations/bitnet.py``): class ``bitlinear`` divides by it, so that it
is 1 / mean |w|, class ``autobitlinear`` in mode ``offline`` multiplies by it, so that it is mean
|w|. No magnitude tells them apart: the configuration does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import ModelError, clip
from bitnet_py.layouts import unpack_checkpoint

MIN_ABSMEAN = np.float32(1e-5)
_CHUNK = 1 << 20
Convention = Literal["divides", "multiplies"]


@dataclass(frozen=True, eq=False)
class Ternary:
    """A ternary matrix: weight = scale * (code - 1)."""

    codes: npt.NDArray[np.uint8]
    """0, 1, 2, ``(rows, cols)``."""
    scale: float
    """A float32 value above 0."""
    dtype: str
    """Type of the weights in the checkpoint: ``uint8`` where they are packed."""


def convention_of(config: Mapping[str, Any]) -> Convention:
    """Return what the model does with ``weight_scale``, from ``quantization_config`` of its ``config.json``.

    Raises:
        ModelError: a class or mode that is not known.
    """
    given = config.get("quantization_config") or {}
    linear_class = given.get("linear_class", "bitlinear")
    mode = given.get("quantization_mode", "offline")
    if linear_class == "bitlinear":
        return "divides"
    if (linear_class, mode) == ("autobitlinear", "offline"):
        return "multiplies"
    raise ModelError(
        f"config.json, quantization_config: expected linear_class bitlinear, or autobitlinear with "
        f"quantization_mode offline, found {clip(str(linear_class))} with {clip(str(mode))}; whether packed "
        "weights are divided or multiplied by weight_scale is not known"
    )


def absmean(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], float]:
    """Quantise a float matrix to codes 0, 1, 2 and a scale.

    As in training (transformers ``WeightQuant``) and in bitnet.cpp's converter (``weight_quant``), in
    float32: s = 1 / max(mean |w|, 1e-5); code - 1 = clip(round(w * s), -1, 1), half to even; the scale
    is 1 / s. The mean is the float32 nearest to the exact one; theirs depends on the order of the
    summation. Where the weights are float16 the scale is rounded to float16, as both do.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    step = max(1, _CHUNK // max(1, values.shape[1]))
    chunks = [slice(first, first + step) for first in range(0, values.shape[0], step)]
    total = sum(float(np.sum(np.abs(values[some]), dtype=np.float64)) for some in chunks)
    if not np.isfinite(total):
        raise ModelError("expected finite weights, found NaN or infinity")
    mean = np.float32(total / values.size)
    inverse = np.float32(1) / max(mean, MIN_ABSMEAN)
    codes = np.empty(values.shape, np.uint8)
    for some in chunks:
        codes[some] = np.clip(np.rint(values[some].astype(np.float32) * inverse), -1, 1) + np.float32(1)
    scale = np.float32(1) / inverse
    return codes, float(np.float16(scale)) if values.dtype == np.float16 else float(scale)


def unpacked(packed: npt.NDArray[np.uint8], weight_scale: npt.NDArray[Any], convention: Convention) -> Ternary:
    """Return a packed matrix ``(rows / 4, cols)`` of a checkpoint and its ``weight_scale`` as a ternary matrix.

    Raises:
        ModelError: code 3, or a ``weight_scale`` that is not one finite number above 0.
    """
    if weight_scale.size != 1:
        raise ModelError(f"weight_scale: expected one number, found {weight_scale.size}")
    given = np.float32(weight_scale.reshape(-1)[0])
    with np.errstate(divide="ignore", over="ignore"):
        scale = given if convention == "multiplies" else np.float32(1) / given
    if not (np.isfinite(given) and given > 0 and np.isfinite(scale) and scale > 0):
        raise ModelError(f"weight_scale: expected a finite number above 0, found {given}")
    codes = unpack_checkpoint(packed)
    if codes.max(initial=0) > 2:
        raise ModelError("packed weights: expected codes 0, 1, 2, found 3")
    return Ternary(codes, float(scale), "uint8")
