"""The certified LM head: its integers, its bounds, and that it finds what the whole head gives, near-ties too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_py import _kernels, _native
from bitnet_py.logits import largest
from bitnet_py.screen import MAX_TOP, Screen
from tests.support.extra import examples
from tests.support.families import FAMILIES

VECTOR = [name for name in FAMILIES if name != "scalar"]
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.sampled_from([8, 16])


def screen_of(rows: np.ndarray, kernel: str | None = None) -> Screen:
    screen = Screen.empty(*rows.shape)
    for i, row in enumerate(rows):
        screen.codes[i], screen.scale[i], screen.error[i], screen.norm[i] = _kernels.screen_row(row, kernel=kernel)
    return screen


def random_rows(rng: np.random.Generator, n_rows: int, dim: int) -> np.ndarray:
    """Rows of very different sizes; some with outliers, some all zero."""
    rows = rng.standard_normal((n_rows, dim)) * 2.0 ** rng.integers(-20, 6, (n_rows, 1))
    rows[rng.random(n_rows) < 0.1] = 0
    outliers = rng.random(rows.shape) < 0.002
    rows[outliers] *= 60
    return np.clip(rows, -65000, 65000).astype(np.float16)


def hidden_state(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Like a normed hidden state: binary16 values, a few far larger than the rest."""
    y = rng.standard_normal(dim) * np.where(rng.random(dim) < 0.01, 30, 1) * 2.0 ** rng.integers(-6, 6)
    return y.astype(np.float16).astype(np.float32)


@settings(max_examples=examples(80), deadline=None)
@given(SEEDS, st.integers(1, 12))
def test_a_row_lies_within_its_bounds(seed, n_blocks):
    (row,) = random_rows(np.random.default_rng(seed), 1, 32 * n_blocks)
    codes, scale, error, norm = _kernels.screen_row(row, kernel="scalar")
    assert abs(codes.astype(int)).max() <= 127
    copy = np.float64(scale) * codes.astype(np.float64)
    lost = np.linalg.norm(row.astype(np.float64) - copy)
    assert lost <= error <= lost * 1.001 + 2e-15
    assert np.linalg.norm(copy) <= norm <= np.linalg.norm(copy) * 1.001


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=examples(80), deadline=None)
@given(SEEDS, st.integers(1, 12), st.sampled_from([None, np.nan, np.inf, -np.inf]))
def test_row_equals_scalar(kernel, seed, n_blocks, bad):
    rng = np.random.default_rng(seed)
    (row,) = random_rows(rng, 1, 32 * n_blocks)
    if bad is not None:
        row[rng.integers(row.size)] = bad
    codes, *bounds = _kernels.screen_row(row, kernel=kernel)
    expected, *expected_bounds = _kernels.screen_row(row, kernel="scalar")
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(bounds, expected_bounds)
    assert np.isfinite(bounds[1]) == (bad is None)


@pytest.mark.parametrize("kernel", FAMILIES)
@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_integer_dot_is_exact(kernel, seed, n_rows, n_blocks, extreme):
    rng = np.random.default_rng(seed)
    n = 32 * n_blocks
    limit = min(32767, (2**31 - 1) // (127 * n))
    codes = rng.integers(-127, 128, (n_rows, n)).astype(np.int8)
    x = rng.integers(-limit, limit + 1, n).astype(np.int16)
    if extreme:
        codes[:], x[:] = 127, limit
    expected = codes.astype(np.int64) @ x.astype(np.int64)
    np.testing.assert_array_equal(_kernels.screen_dots(codes, x, kernel=kernel), expected)


def assert_top_is_that_of_the_whole_head(rows, screen, y, n, *, simd_width, kernel=None) -> int:
    logits = _kernels.dots(rows, y, simd_width=simd_width, shape="dot", kernel=kernel)
    expected = largest(logits, n)
    ids, found, n_read = _kernels.top(rows, y, n, screen.struct(), simd_width=simd_width, kernel=kernel)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(found.view(np.uint32), logits[expected].view(np.uint32))
    assert n <= n_read <= len(rows)
    return n_read


@pytest.mark.parametrize("kernel", FAMILIES)
@settings(max_examples=examples(40), deadline=None)
@given(SEEDS, st.integers(2, 90), st.integers(1, 8), st.integers(1, MAX_TOP), WIDTHS)
def test_top_is_that_of_the_whole_head(kernel, seed, n_rows, n_blocks, n, width):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, n_rows, 32 * n_blocks)
    y = hidden_state(rng, rows.shape[1])
    assert_top_is_that_of_the_whole_head(rows, screen_of(rows), y, min(n, n_rows), simd_width=width, kernel=kernel)


def near_tie_head(rng: np.random.Generator, n_rows: int, dim: int) -> np.ndarray:
    """Rows that nearly agree: copies, copies with one bit changed, copies with two elements exchanged."""
    base = rng.standard_normal(dim).astype(np.float16)
    rows = np.tile(base, (n_rows, 1))
    for row in rows[1:]:
        kind, i, j = rng.integers(3), *rng.integers(0, dim, 2)
        if kind == 1:
            row[i : i + 1].view(np.uint16)[0] ^= 1
        elif kind == 2:
            row[i], row[j] = row[j], row[i]
    return rows


def test_thousands_of_states_with_near_ties():
    """4,000 states against heads whose rows differ by a bit or not at all: where a wrong bound would show."""
    rng = np.random.default_rng(7)
    ties = 0
    for head in range(20):
        rows = near_tie_head(rng, 64, 256)
        if head % 2:
            rows[32:] = rng.permutation(rows[:32])  # every row has a twin
        screen = screen_of(rows)
        for state in range(200):
            y = hidden_state(rng, 256)
            if state % 4 == 0:
                y = (y * 0 + rows[rng.integers(64)] * np.float16(2)).astype(np.float32)  # aligned with a row
            n = (1, 1, 1, 5)[state % 4]
            assert_top_is_that_of_the_whole_head(rows, screen, y, n, simd_width=(8, 16)[head // 2 % 2])
            logits = _kernels.dots(rows, y, simd_width=(8, 16)[head // 2 % 2], shape="dot")
            ties += int((logits == logits.max()).sum() > 1)
    assert ties > 1000


def test_most_rows_are_not_read():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4000, 512)).astype(np.float16)
    screen = screen_of(rows)
    read = [
        assert_top_is_that_of_the_whole_head(rows, screen, hidden_state(rng, 512), 1, simd_width=8)
        for _ in range(50)
    ]
    assert np.mean(read) < 40


@pytest.mark.parametrize("what", ["error", "norm"])
def test_a_copy_that_is_wrong_is_noticed_by_these_tests(what):
    """Bounds of 0 lose winners in near-tie heads: the equality above is not vacuous."""
    rng = np.random.default_rng(3)
    lost = 0
    for _ in range(60):
        rows = rng.standard_normal((400, 64)).astype(np.float16)
        screen = screen_of(rows)
        screen.error[:] = 0
        if what == "norm":
            screen.norm[:] = 0
        y = hidden_state(rng, 64)
        expected = largest(_kernels.dots(rows, y, simd_width=8, shape="dot"), 20)
        lost += int((_kernels.top(rows, y, 20, screen.struct(), simd_width=8)[0] != expected).any())
    assert lost > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_hidden(bad):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 64)).astype(np.float16)
    rows[33, 5] = bad
    y = hidden_state(rng, 64)
    _, found, _ = _kernels.top(rows, y, 50, screen_of(rows).struct(), simd_width=8)
    assert not np.isfinite(found).all()
    y[7] = bad
    good = rng.standard_normal((50, 64)).astype(np.float16)
    _, found, n_read = _kernels.top(good, y, 1, screen_of(good).struct(), simd_width=8)
    assert not np.isfinite(found).all()
    assert n_read == 50


@pytest.mark.parametrize(("n", "dim"), [(0, 64), (257, 64), (11, 64), (1, 48)])
def test_arguments_out_of_range_are_refused(n, dim):
    rows = np.zeros((10, dim), np.float16)
    screen = Screen.empty(10, dim)
    with pytest.raises(_native.NativeError, match="must be"):
        _kernels.top(rows, np.zeros(dim, np.float32), n, screen.struct(), simd_width=8)
