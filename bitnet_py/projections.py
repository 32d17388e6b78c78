"""The types that a ternary matrix may have in a file, and its bytes in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from bitnet_py.config import I2_S_BLOCK
from bitnet_py.ggml_types import GGMLType
from bitnet_py.quants import i2_s_tensor
from bitnet_py.tq import TQ_BLOCK, TQ_TYPES, tq_tensor

PROJECTIONS: Mapping[str, GGMLType] = MappingProxyType(
    {ggml_type.name.lower(): ggml_type for ggml_type in (GGMLType.I2_S, *TQ_TYPES)}
)
"""Name on command lines -> type."""


def block_of(ggml_type: GGMLType) -> int:
    """Return how many weights of a row make one block."""
    return TQ_BLOCK if ggml_type in TQ_TYPES else I2_S_BLOCK


def ternary_tensor(packed: npt.NDArray[np.uint8], scale: float, ggml_type: GGMLType) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor of packed I2_S codes; TQ1_0 and TQ2_0 round the scale to float16.

    Raises:
        ModelError: the scale is none that the type holds.
    """
    return tq_tensor(packed, scale, ggml_type) if ggml_type in TQ_TYPES else i2_s_tensor(packed, scale)
