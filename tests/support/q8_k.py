"""Ternary weights times activations in blocks, as llama.cpp's sources say; shares no code with the project."""

from __future__ import annotations

import numpy as np

F32 = np.float32
BLOCK = 256


def quantize(row: np.ndarray, *, fused: bool = False) -> tuple[list[np.ndarray], list[np.float32]]:
    """``quantize_row_q8_K_ref``: codes and step of every block of a row."""
    codes, steps = [], []
    for block in row.reshape(-1, BLOCK):
        largest, magnitude = F32(0), F32(0)
        for x in block:
            if abs(x) > magnitude:
                magnitude, largest = abs(x), x
        if magnitude == 0:
            codes.append(np.zeros(BLOCK, int))
            steps.append(F32(0))
            continue
        factor = F32(-127.0) / largest
        scaled = [np.float64(factor) * np.float64(x) for x in block] if fused else [factor * x for x in block]
        codes.append(np.array([min(127, int(np.rint(value))) for value in scaled]))
        steps.append(F32(1.0) / factor)
    return codes, steps


def multiply(
    x: np.ndarray, signs: np.ndarray, scale: float, *, fused: bool, lanes: int = 8, fused_quantizer: bool = False
) -> np.ndarray:
    """``ggml_vec_dot_tq2_0_q8_K``: eight lanes as for AVX2, one as for NEON and plain C. ``(n, rows)``."""
    out = np.zeros((len(x), len(signs)), F32)
    for token, row in enumerate(x):
        codes, steps = quantize(row, fused=fused_quantizer)
        acc = np.zeros((len(signs), lanes), F32)
        for number, (q, d) in enumerate(zip(codes, steps, strict=True)):
            block = signs[:, BLOCK * number : BLOCK * (number + 1)].astype(int)
            if lanes == 8:
                sums = ((block + 1) * q).reshape(-1, 8, 8, 4).sum(axis=(1, 3)) - q.reshape(8, 32).sum(axis=1)
            else:
                sums = (block * q).sum(axis=1, keepdims=True)
            factor = F32(d) * F32(scale)
            exact = sums.astype(np.longdouble) * factor  # 14 and 24 bits
            acc = (exact + acc).astype(F32) if fused else exact.astype(F32) + acc
        while acc.shape[1] > 1:
            half = acc.shape[1] // 2
            acc = acc[:, half:] + acc[:, :half]
        out[token] = acc[:, 0]
    return out
