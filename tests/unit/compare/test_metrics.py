"""Metrics against direct formulas, and every degenerate input."""

from __future__ import annotations

import numpy as np
import pytest

from crossval.compare.metrics import measure


def f32(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def rows(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, m)).astype(np.float32)


def test_equal_bits_give_exact_values() -> None:
    a = rows(5, 33)
    m = measure(a, a.copy())
    assert m.bitwise_equal
    assert (m.exact_match_rate, m.n_equal, m.n_elements, m.n_tokens) == (1.0, 165, 165, 5)
    assert (m.cosine, m.worst_token_cosine, m.nmse, m.worst_token_nmse) == (1.0, 1.0, 0.0, 0.0)
    assert (m.max_abs, m.max_ulp, m.norm_ratio, m.worst_token) == (0.0, 0, 1.0, None)


def test_values_follow_their_formulas() -> None:
    c, r = rows(7, 50, 1), rows(7, 50, 2)
    m = measure(c, r)
    c64, r64 = c.astype(float), r.astype(float)
    assert m.cosine == pytest.approx(np.vdot(c64, r64) / np.linalg.norm(c64) / np.linalg.norm(r64))
    assert m.nmse == pytest.approx(np.sum((c64 - r64) ** 2) / np.sum(r64**2))
    assert m.norm_ratio == pytest.approx(np.linalg.norm(c64) / np.linalg.norm(r64))
    assert m.max_abs == np.max(np.abs(c64 - r64))
    each = np.sum((c64 - r64) ** 2, 1) / np.sum(r64**2, 1)
    assert m.worst_token == int(np.argmax(each))
    assert m.worst_token_nmse == pytest.approx(each.max())
    assert m.token_nmse == pytest.approx(each)
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(c64, r64, strict=True)]
    assert m.worst_token_cosine == pytest.approx(min(cosines))


def test_scale_error_has_cosine_one_and_is_seen_by_norm_and_nmse() -> None:
    r = rows(3, 64)
    m = measure(r * np.float32(2), r)
    assert m.cosine == pytest.approx(1.0, abs=1e-15)
    assert m.norm_ratio == 2.0
    assert m.nmse == pytest.approx(1.0)


def test_one_wrong_token_is_named() -> None:
    r = rows(100, 64)
    c = r.copy()
    c[42] = -c[42]
    m = measure(c, r)
    assert m.worst_token == 42
    assert m.worst_token_cosine == -1.0
    assert m.worst_token_nmse == pytest.approx(4.0)
    assert m.cosine is not None
    assert m.cosine > 0.97


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nonfinite_values_leave_no_distance(bad: float, side: int) -> None:
    pair = [rows(2, 4), rows(2, 4)]
    pair[side][1, 2] = bad
    m = measure(pair[0], pair[1])
    assert (m.candidate_nonfinite, m.reference_nonfinite) == (1 - side, side)
    assert m.cosine is m.nmse is m.max_abs is m.norm_ratio is m.max_ulp is m.worst_token_nmse is None
    assert m.exact_match_rate == 7 / 8


def test_equal_nan_bits_are_counted_but_have_no_distance() -> None:
    a = f32(np.nan, 1.0)
    m = measure(a, a.copy())
    assert m.bitwise_equal
    assert m.max_abs is None
    assert (m.candidate_nonfinite, m.reference_nonfinite) == (1, 1)


def test_signed_zeros_differ_in_bits_only() -> None:
    m = measure(f32(0.0, 1.0), f32(-0.0, 1.0))
    assert not m.bitwise_equal
    assert (m.exact_match_rate, m.max_ulp, m.max_abs, m.nmse) == (0.5, 0, 0.0, 0.0)


def test_zero_vectors_are_explicit() -> None:
    zero, one = f32(0, 0), f32(0, 1)
    both = measure(zero, zero)
    assert (both.cosine, both.nmse, both.norm_ratio, both.worst_token_cosine) == (None, 0.0, 1.0, None)
    ours = measure(zero, one)
    assert (ours.cosine, ours.nmse, ours.norm_ratio) == (0.0, 1.0, 0.0)
    theirs = measure(one, zero)
    assert (theirs.cosine, theirs.nmse, theirs.norm_ratio, theirs.worst_token_nmse) == (0.0, None, None, None)
    assert theirs.worst_token == 0


def test_ulp_distance_counts_float_neighbours() -> None:
    one = np.float32(1)
    assert measure(f32(np.nextafter(one, np.float32(2))), f32(1)).max_ulp == 1
    tiny = np.float32(1e-45)
    assert measure(f32(tiny), f32(-tiny)).max_ulp == 2
    assert measure(f32(np.finfo(np.float32).max), f32(np.finfo(np.float32).min)).max_ulp == 2 * 0x7F7FFFFF


def test_largest_floats_do_not_overflow() -> None:
    big = np.full((2, 3), np.finfo(np.float32).max)
    m = measure(big, -big)
    assert (m.cosine, m.nmse) == (-1.0, 4.0)
    small = np.full((2, 3), np.float32(1e-45))
    assert measure(small, -small).cosine == -1.0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_to_compare_is_an_error(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="nothing to compare"):
        measure(empty, empty)


def test_shape_and_type_must_match() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        measure(rows(2, 3), rows(3, 2))
    with pytest.raises(ValueError, match="float32 expected"):
        measure(rows(2, 3).astype(np.float64), rows(2, 3))  # type: ignore[arg-type]


def test_tokens_may_be_on_another_axis() -> None:
    r = np.stack([rows(5, 6, 1), rows(5, 6, 2)])
    c = r.copy()
    c[1, 3] *= 3
    m = measure(c, r, token_axis=1)
    assert (m.n_tokens, m.worst_token) == (5, 3)


def test_what_is_not_visible_is_not_compared() -> None:
    r = np.stack([rows(3, 3, 1), rows(3, 3, 2)])
    c = r.copy()
    c[:, 0, 1:] = np.nan
    visible = np.tril(np.ones((3, 3), bool))
    m = measure(c, r, token_axis=1, visible=visible)
    assert m.bitwise_equal
    assert (m.n_elements, m.max_abs) == (12, 0.0)
    c[1, 2, 0] += 1
    assert measure(c, r, token_axis=1, visible=visible).n_equal == 11
    with pytest.raises(ValueError, match="no element is visible"):
        measure(c, r, token_axis=1, visible=np.zeros((3, 3), bool))
    with pytest.raises(ValueError, match="visible has shape"):
        measure(c, r, token_axis=1, visible=np.ones((2, 3), bool))


@pytest.mark.parametrize("shape", [(3, 700_001), (1, 1_100_000), (2000, 600)])
def test_chunks_do_not_change_the_result(shape: tuple[int, int]) -> None:
    r = rows(*shape, 3)
    c = r.copy()
    c[-1, -1] += 1
    m = measure(c, r)
    assert (m.n_elements, m.n_equal) == (r.size, r.size - 1)
    assert m.worst_token == shape[0] - 1
    assert m.max_abs == pytest.approx(1.0, abs=1e-6)
    assert m.nmse == pytest.approx(m.max_abs**2 / np.sum(r.astype(np.float64) ** 2), rel=1e-9)


def test_a_late_nan_takes_back_earlier_distances() -> None:
    r = rows(2000, 600)
    c = r.copy()
    c[-1, -1] = np.nan
    m = measure(c, r)
    assert m.cosine is m.worst_token_cosine is m.nmse is m.worst_token_nmse is m.max_abs is m.norm_ratio is None
    assert m.n_equal == r.size - 1
