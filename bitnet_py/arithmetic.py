"""Whose arithmetic the engine follows, in everything on which bitnet.cpp's own result depends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitnet_py.errors import InputError

Generation = Literal["march", "main"]
"""bitnet.cpp of March 2026, or its main since July 2026."""
GENERATIONS: tuple[Generation, ...] = ("march", "main")
"""In the order of the enum in csrc/bitnet.h."""


@dataclass(frozen=True)
class Arithmetic:
    """In which order and precision results are computed (docs/numerics.md); any machine computes any of them.

    Raises ``InputError`` for what no bitnet.cpp computes.
    """

    generation: Generation = "march"
    simd_width: int = 8
    """Lanes of the float reductions, 8 or 16: the bits of an AVX2 or an AVX-512 build. 8 by default
    everywhere, so that a model gives the same bits on every machine."""
    fused_quantizer: bool = False
    """March, or in blocks: quantise activations as a gcc build of the quantiser does."""
    block_quantizer: bool = False
    """Quantise activations in blocks of 256, as llama.cpp does for matrices of TQ1_0 and TQ2_0 (Q8_K), and
    multiply them as an AVX2 build; the model's definition, and I2_S, have one step for a row."""
    fused_sums: bool = False
    """In blocks only: add a block's scaled sum in one rounding, as a gcc build does."""
    bfloat_pairs: bool = False
    """16 lanes only: multiply an LM head of BF16 as a build for AVX512-BF16 does."""
    half_sums: bool = False
    """Main only: dot products accumulate in binary16, as in a build for AVX512-FP16 (16 lanes)."""
    flash_attention: bool = False
    """Main only: attention as one operation, as main computes it by default."""
    attention_threads: int = 1
    """Into how many parts flash attention of a single token divides its cells from 257 tokens on: the
    threads of the reference."""
    follow_reference: bool = False
    """Main only: also compute what main computes instead of the model: SiLU for every activation, NaN
    for an all-zero row of activations."""

    def __post_init__(self) -> None:
        if self.generation not in GENERATIONS:
            raise InputError(f"generation must be {' or '.join(GENERATIONS)}, not {self.generation!r}")
        if self.simd_width not in (8, 16):
            raise InputError(f"simd_width must be 8 or 16, not {self.simd_width}")
        if self.attention_threads < 1:
            raise InputError(f"attention_threads must be at least 1, not {self.attention_threads}")
        if self.generation == "main" and self.fused_quantizer and not self.block_quantizer:
            raise InputError("fused_quantizer belongs to generation march, or to block_quantizer")
        if self.fused_sums and not self.block_quantizer:
            raise InputError("fused_sums belong to block_quantizer")
        of_main = ("half_sums", "flash_attention", "follow_reference")
        given = [name for name in of_main if getattr(self, name)]
        if given and self.generation != "main":
            raise InputError(f"{' and '.join(given)} belong to generation main, not {self.generation}")
        if self.bfloat_pairs and self.simd_width != 16:
            raise InputError("bfloat_pairs belong to simd_width 16")
        if self.half_sums and self.simd_width != 16:
            raise InputError("half_sums belong to simd_width 16")

    @property
    def cell_multiple(self) -> int:
        """Attention reads the cells of the KV cache in whole groups of this many."""
        return 256 if self.generation == "main" else 32


MARCH = Arithmetic()
MAIN = Arithmetic("main")
