"""Numbers comparing two arrays of the same shape, token by token: nothing is ever compared silently.

All sums are float64 over chunks of tokens, so that memory stays bounded; squares of float32 cannot overflow there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Metrics:
    """How far ``candidate`` is from ``reference``. A metric is None where its formula is undefined.

    When either side holds NaN or an infinity every distance is None; only the counts and bits are given.
    """

    n_elements: int
    n_tokens: int
    n_equal: int
    """Elements with the same 32 bits; +0 and -0 have different bits."""
    bitwise_equal: bool
    exact_match_rate: float
    candidate_nonfinite: int
    reference_nonfinite: int
    max_ulp: int | None
    """Largest count of float32 values between two elements; +0 and -0 are 0 apart."""
    cosine: float | None
    """``c.r / (|c| |r|)``; 0.0 when exactly one side is all zeros, None when both are."""
    worst_token_cosine: float | None
    """Smallest cosine of one token's row, by the same rules; tokens that are zero on both sides do not count."""
    nmse: float | None
    """``|c - r|^2 / |r|^2``; None when the reference is all zeros."""
    worst_token_nmse: float | None
    """Largest NMSE of one token's row; None when some token's reference row is zero and the candidate's is not."""
    worst_token: int | None
    """Index on the token axis of the largest NMSE; None when nothing differs in value."""
    token_nmse: tuple[float | None, ...] | None
    """NMSE of each token's row, None where the reference row is zero and the candidate's is not; None as a whole
    when an element is not finite."""
    max_abs: float | None
    norm_ratio: float | None
    """``|c| / |r|``; 1.0 when both are all zeros, None when only the reference is."""


def measure(
    candidate: F32, reference: F32, *, token_axis: int = 0, visible: npt.NDArray[np.bool_] | None = None
) -> Metrics:
    """Compare two float32 arrays of one shape.

    ``visible``, shape ``(n_tokens, n_last)``, limits each token's row to some indices of the last axis (causal
    attention scores: what the mask hides is never read); None compares everything.

    Raises:
        ValueError: shapes or types differ, no element is left to compare, or ``visible`` does not fit.
    """
    if candidate.dtype != np.float32 or reference.dtype != np.float32:
        raise ValueError(f"float32 expected, candidate is {candidate.dtype}, reference {reference.dtype}")
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: candidate {candidate.shape}, reference {reference.shape}")
    if candidate.size == 0:
        raise ValueError(f"nothing to compare: shape {candidate.shape} has no elements")
    c_rows, r_rows = np.moveaxis(candidate, token_axis, 0), np.moveaxis(reference, token_axis, 0)
    n_tokens = c_rows.shape[0]
    if visible is not None and visible.shape != (n_tokens, candidate.shape[-1]):
        raise ValueError(f"visible has shape {visible.shape}, expected {(n_tokens, candidate.shape[-1])}")
    total = _Sums(n_tokens)
    row_elements = candidate.size // n_tokens
    # Long rows (logits) are cut too: a step is a few tokens, or a piece of one.
    step = max(1, _CHUNK_ELEMENTS // row_elements)
    for first in range(0, n_tokens, step):
        tokens = slice(first, min(first + step, n_tokens))
        c, r = c_rows[tokens], r_rows[tokens]
        mask = None
        if visible is not None:
            mask = np.broadcast_to(visible[tokens].reshape(c.shape[0], *(1,) * (c.ndim - 2), c.shape[-1]), c.shape)
        flat = (c.shape[0], row_elements)
        total.add(tokens, c.reshape(flat), r.reshape(flat), None if mask is None else mask.reshape(flat))
    if total.n_elements == 0:
        raise ValueError("nothing to compare: no element is visible")
    return total.result()


class _Sums:
    """Running sums per token."""

    def __init__(self, n_tokens: int) -> None:
        self.n_elements = 0
        self.n_equal = 0
        self.nonfinite = [0, 0]
        self.max_ulp = 0
        self.max_abs = 0.0
        self.dot, self.cc, self.rr, self.dd = (np.zeros(n_tokens) for _ in range(4))

    def add(self, tokens: slice, c: F32, r: F32, mask: npt.NDArray[np.bool_] | None) -> None:
        n_cols = c.shape[1]
        for first in range(0, n_cols, _CHUNK_ELEMENTS):
            part = slice(first, first + _CHUNK_ELEMENTS)
            self._add(tokens, c[:, part], r[:, part], None if mask is None else mask[:, part])

    def _add(self, tokens: slice, c: F32, r: F32, mask: npt.NDArray[np.bool_] | None) -> None:
        equal = np.ascontiguousarray(c).view(np.uint32) == np.ascontiguousarray(r).view(np.uint32)
        if mask is not None:
            equal &= mask
            c, r = np.where(mask, c, np.float32(0)), np.where(mask, r, np.float32(0))
        self.n_elements += c.size if mask is None else int(np.count_nonzero(mask))
        self.n_equal += int(np.count_nonzero(equal))
        for side, array in enumerate((c, r)):
            self.nonfinite[side] += array.size - int(np.count_nonzero(np.isfinite(array)))
        if any(self.nonfinite):
            return
        c64, r64 = c.astype(np.float64), r.astype(np.float64)
        diff = c64 - r64
        self.dot[tokens] += np.einsum("ij,ij->i", c64, r64)
        self.cc[tokens] += np.einsum("ij,ij->i", c64, c64)
        self.rr[tokens] += np.einsum("ij,ij->i", r64, r64)
        self.dd[tokens] += np.einsum("ij,ij->i", diff, diff)
        self.max_abs = max(self.max_abs, float(np.max(np.abs(diff))))
        self.max_ulp = max(self.max_ulp, int(ulp_distance(c, r).max()))

    def result(self) -> Metrics:
        equal_bits = self.n_equal == self.n_elements
        finite = not any(self.nonfinite)
        each = tuple(_nmse(float(dd), float(rr)) for dd, rr in zip(self.dd, self.rr, strict=True))
        token, token_nmse = _worst_nmse(each)
        cc, rr, dd = float(self.cc.sum()), float(self.rr.sum()), float(self.dd.sum())
        return Metrics(
            n_elements=self.n_elements,
            n_tokens=len(self.dot),
            n_equal=self.n_equal,
            bitwise_equal=equal_bits,
            exact_match_rate=self.n_equal / self.n_elements,
            candidate_nonfinite=self.nonfinite[0],
            reference_nonfinite=self.nonfinite[1],
            max_ulp=self.max_ulp if finite else None,
            cosine=_cosine(float(self.dot.sum()), cc, rr) if finite else None,
            worst_token_cosine=self._worst_cosine() if finite else None,
            nmse=_nmse(dd, rr) if finite else None,
            worst_token_nmse=token_nmse if finite else None,
            worst_token=token if finite else None,
            token_nmse=each if finite else None,
            max_abs=self.max_abs if finite else None,
            norm_ratio=_norm_ratio(cc, rr) if finite else None,
        )

    def _worst_cosine(self) -> float | None:
        each = (
            _cosine(float(dot), float(cc), float(rr))
            for dot, cc, rr in zip(self.dot, self.cc, self.rr, strict=True)
        )
        return min((value for value in each if value is not None), default=None)


def _cosine(dot: float, cc: float, rr: float) -> float | None:
    if cc == 0.0 and rr == 0.0:
        return None
    if cc == 0.0 or rr == 0.0:
        return 0.0
    # sqrt(x * x) is x in IEEE arithmetic: equal vectors give exactly 1.
    return min(1.0, max(-1.0, dot / math.sqrt(cc * rr)))


def _nmse(dd: float, rr: float) -> float | None:
    if dd == 0.0:
        return 0.0
    return None if rr == 0.0 else dd / rr


def _norm_ratio(cc: float, rr: float) -> float | None:
    if rr == 0.0:
        return 1.0 if cc == 0.0 else None
    return math.sqrt(cc / rr)


def _worst_nmse(each: Sequence[float | None]) -> tuple[int | None, float | None]:
    """Return (token, NMSE) of the worst token, the first of several; undefined is worse than any number."""
    worst = None if None in each else max(value for value in each if value is not None)
    return (None, 0.0) if worst == 0.0 else (each.index(worst), worst)


def ulp_distance(a: F32, b: F32) -> npt.NDArray[np.int64]:
    """Return how many float32 values apart each pair of two finite arrays is, shaped as they are."""
    distance: npt.NDArray[np.int64] = np.abs(_ordered(a) - _ordered(b))
    return distance


def _ordered(x: F32) -> npt.NDArray[np.int64]:
    """Map float32 values to integers in the same order, neighbours 1 apart, both zeros to 0."""
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
