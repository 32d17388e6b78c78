"""What is found of the product with matrices in blocks, on stand-ins compiled from the sources' formulas."""

from __future__ import annotations

from ctypes import CDLL
from pathlib import Path

import numpy as np
import pytest

from crossval.bitnet_cpp import main, probe_blocks
from crossval.bitnet_cpp.abi import Library
from tests.support import q8_k
from tests.support.c_compiler import compile_library, needs_compiler

pytestmark = needs_compiler

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef struct { float d; int8_t qs[256]; int16_t sums[16]; } block_q8;
typedef struct { uint8_t qs[64]; uint16_t d; } block_tq2;
static float half(uint16_t h) { /* normal numbers only */
    const uint32_t u = (uint32_t)(((h >> 10) & 31) + 112) << 23 | (uint32_t)(h & 1023) << 13;
    float f; memcpy(&f, &u, 4); return f;
}
void quantize_row_q8_K(const float * x, void * out, int64_t n) {
    block_q8 * y = out;
    for (int64_t b = 0; b < n / 256; b++, x += 256) {
        float largest = 0;
        for (int i = 0; i < 256; i++) if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
        const float factor = -127.0f / largest;
        for (int i = 0; i < 256; i++) {
#ifdef FUSED_QUANTIZER
            const double scaled = (double) factor * x[i];
#else
            const float scaled = factor * x[i];
#endif
            y[b].qs[i] = (int8_t) rint(scaled);
        }
        for (int g = 0; g < 16; g++) {
            y[b].sums[g] = 0;
            for (int i = 0; i < 16; i++) y[b].sums[g] += y[b].qs[16 * g + i];
        }
        y[b].d = 1 / factor;
    }
}
#ifndef NO_DOT
void ggml_vec_dot_tq2_0_q8_K(
    int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    const block_tq2 * x = vx; const block_q8 * y = vy;
    float acc[8] = {0};
    (void) bs; (void) bx; (void) by; (void) nrc;
    for (int b = 0; b < n / 256; b++) {
        int32_t sums[8] = {0};
        for (int i = 0; i < 256; i++)
            sums[i % 32 / 4] += ((x[b].qs[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32))) & 3) * y[b].qs[i];
        const float d = y[b].d * half(x[b].d);
        for (int l = 0; l < 8; l++) {
            const float sum = (float)(sums[l] - y[b].sums[2 * l] - y[b].sums[2 * l + 1]);
#ifdef FUSED_SUMS
            acc[l] = fmaf(sum, d, acc[l]);
#else
            acc[l] = sum * d + acc[l];
#endif
        }
    }
#ifdef OTHER_ORDER
    *s = 0;
    for (int l = 0; l < 8; l++) *s += acc[l];
#else
    for (int half = 4; half; half /= 2) for (int l = 0; l < half; l++) acc[l] += acc[l + half];
    *s = acc[0];
#endif
}
#endif
"""


def probed(folder: Path, *flags: str) -> dict[str, bool | None]:
    path = compile_library(
        folder / "lib.so", SOURCE, "-ffp-contract=off", "-O1", *(f"-D{flag}" for flag in flags), "-lm"
    )
    library = Library.__new__(Library)
    library.shared_object, library.table = CDLL(str(path)), main.TABLE
    return probe_blocks.rounding(library)


@pytest.mark.parametrize("quantizer", [True, False])
@pytest.mark.parametrize("sums", [True, False])
def test_both_facts_are_found(tmp_path: Path, quantizer: bool, sums: bool) -> None:
    flags = ["FUSED_QUANTIZER"] * quantizer + ["FUSED_SUMS"] * sums
    assert probed(tmp_path, *flags) == {"fused_quantizer": quantizer, "fused_sums": sums}


def test_another_order_of_summation_is_unknown(tmp_path: Path) -> None:
    assert probed(tmp_path, "OTHER_ORDER") == {"fused_quantizer": False, "fused_sums": None}


def test_a_library_without_the_product(tmp_path: Path) -> None:
    assert probed(tmp_path, "NO_DOT") == {"fused_quantizer": False, "fused_sums": None}


def test_a_library_without_any_of_it(tmp_path: Path) -> None:
    library = Library.__new__(Library)
    library.shared_object = CDLL(str(compile_library(tmp_path / "lib.so", "int nothing;\n")))
    library.table = main.TABLE
    assert probe_blocks.rounding(library) == {"fused_quantizer": None, "fused_sums": None}


def test_ties_tell_the_two_quantisers_apart() -> None:
    x = probe_blocks.ties()
    differ = np.count_nonzero(probe_blocks.codes(x, fused=True) != probe_blocks.codes(x, fused=False))
    assert differ > 20
    for fused in (True, False):
        np.testing.assert_array_equal(probe_blocks.codes(x, fused=fused), q8_k.quantize(x, fused=fused)[0][0])
