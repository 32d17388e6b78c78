"""The tensor types of ggml and the bytes they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

I2_S_TAIL_BYTES = 32
"""Bytes after the packed weights of an I2_S tensor: the float32 scale, then padding."""


class GGMLType(IntEnum):
    """Tensor types of ggml at bitnet.cpp's pinned version (ggml.h, enum ggml_type)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    I2_S = 36


LOOKUP_TYPES: Mapping[int, str] = MappingProxyType(
    {
        38: "TL1",
        39: "TL2 of bitnet.cpp of March 2026, or MXFP4",
        42: "TL2 of bitnet.cpp's main",
    }
)
"""Numbers of the types made for lookup kernels, in both generations: the layout depends on the build that reads
it, and the file does not tell which that is."""
OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        29: "IQ1_M",
        40: "NVFP4",
        41: "Q1_0",
    }
)
"""Numbers of types that are not read here, for messages."""


BLOCK_LAYOUT: Mapping[GGMLType, tuple[int, int]] = MappingProxyType(
    {
        GGMLType.F32: (1, 4),
        GGMLType.F16: (1, 2),
        GGMLType.Q4_0: (32, 18),
        GGMLType.Q4_1: (32, 20),
        GGMLType.Q5_0: (32, 22),
        GGMLType.Q5_1: (32, 24),
        GGMLType.Q8_0: (32, 34),
        GGMLType.Q8_1: (32, 36),
        GGMLType.Q2_K: (256, 84),
        GGMLType.Q3_K: (256, 110),
        GGMLType.Q4_K: (256, 144),
        GGMLType.Q5_K: (256, 176),
        GGMLType.Q6_K: (256, 210),
        GGMLType.Q8_K: (256, 292),
        GGMLType.I8: (1, 1),
        GGMLType.I16: (1, 2),
        GGMLType.I32: (1, 4),
        GGMLType.I64: (1, 8),
        GGMLType.F64: (1, 8),
        GGMLType.BF16: (1, 2),
        GGMLType.TQ1_0: (256, 54),
        GGMLType.TQ2_0: (256, 66),
        GGMLType.I2_S: (4, 1),
    }
)
"""Elements and bytes of one block; I2_S adds ``I2_S_TAIL_BYTES`` per tensor."""


FILE_TYPES: Mapping[GGMLType, int] = MappingProxyType(
    {GGMLType.F32: 0, GGMLType.F16: 1, GGMLType.TQ1_0: 36, GGMLType.TQ2_0: 37, GGMLType.I2_S: 40}
)
"""Type of the matrices -> ``general.file_type`` (llama.h, enum llama_ftype); informative only."""


def tensor_size_bytes(shape: tuple[int, ...], ggml_type: GGMLType) -> int | None:
    """Return the bytes a tensor occupies, or None when its rows are not whole blocks.

    Source: bitnet.cpp ggml.c ``ggml_nbytes`` (I2_S: one byte per four weights and 32 more per
    tensor).
    """
    elements, size = BLOCK_LAYOUT[ggml_type]
    if shape[-1] % elements:
        return None
    tail = I2_S_TAIL_BYTES if ggml_type is GGMLType.I2_S else 0
    return math.prod(shape) // elements * size + tail
