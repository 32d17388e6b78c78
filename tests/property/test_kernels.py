"""Every kernel family against the scalar specification (equal bits), and the scalar one against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py import _native

FAMILIES = _native.kernel_families()
VECTOR = [f.name for f in FAMILIES if f.name != "scalar" and f.available]
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.sampled_from([8, 16])
SKEWS = st.integers(0, 63)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "scalar"], ids=lambda f: f.name)
def test_this_cpu_can_test_the_family(family):
    if not family.available:
        pytest.skip(f"kernel {family.name} at most emulated here: this CPU lacks {family.description}")
    assert family.name in VECTOR


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))


def unaligned(x: np.ndarray, skew: int) -> np.ndarray:
    """Return a contiguous copy that starts ``skew`` items behind an address aligned to 64 bytes."""
    room = np.empty(x.nbytes + 64 + skew * x.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + skew * x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def pack(codes: np.ndarray) -> np.ndarray:
    """I2_S from its definition: byte p of a block holds elements p, 32+p, 64+p, 96+p, highest bits first."""
    rows, k = codes.shape
    blocks = codes.reshape(rows, k // 128, 4, 32).astype(np.uint8)
    return np.ascontiguousarray(
        (blocks[:, :, 0] << 6 | blocks[:, :, 1] << 4 | blocks[:, :, 2] << 2 | blocks[:, :, 3]).reshape(
            rows, k // 4
        )
    )


def integer_case(seed: int, rows: int, n_blocks: int, n_cols: int, extreme: bool):
    rng = np.random.default_rng(seed)
    k = 128 * n_blocks
    if extreme:  # saturated activations and weights: what overflows 16-bit lanes
        codes = np.full((rows, k), rng.integers(0, 4), np.int64)
        x = np.full((n_cols, k), rng.choice([-128, -127, 127]), np.int8)
    else:
        codes = rng.integers(0, 4, (rows, k))  # code 3 never occurs in files; the kernels still agree on it
        x = rng.integers(-128, 128, (n_cols, k), dtype=np.int8)
    return codes, x


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 19), st.integers(1, 67), st.integers(1, 21), st.booleans())
def test_scalar_i2s_dot_is_the_exact_integer(seed, rows, n_blocks, n_cols, extreme):
    codes, x = integer_case(seed, rows, min(n_blocks, 5), n_cols, extreme)
    expected = x.astype(np.int64) @ codes.T
    np.testing.assert_array_equal(_native.i2s_dot(pack(codes), x, kernel="scalar"), expected)


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=80, deadline=None)
@given(
    SEEDS, st.integers(1, 19) | st.integers(30, 36), st.integers(1, 67), st.integers(1, 70), st.booleans(), SKEWS
)
def test_i2s_dot_equals_numpy_at_odd_sizes_and_extremes(kernel, seed, rows, n_blocks, n_cols, extreme, skew):
    codes, x = integer_case(seed, rows, n_blocks, n_cols, extreme)
    if extreme and codes[0, 0] == 3:
        codes[:] = 2  # 16-bit lanes are only promised for the codes that files hold
    expected = x.astype(np.int64) @ codes.T
    packed, x = unaligned(pack(codes), skew), unaligned(x, skew * 5 % 64)
    np.testing.assert_array_equal(_native.i2s_dot(packed, x, kernel=kernel), expected)


FLOATS = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
)


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_scalar_quantiser_is_bitnet_cpps_formula(x):
    q, scale, total = _native.quantize(x, kernel="scalar")
    expected_scale = np.float32(127.0 / max(1e-5, float(np.abs(x).max())))
    assert scale == expected_scale
    expected = np.clip(np.rint(x * expected_scale), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(q, expected)
    assert total == int(expected.astype(np.int64).sum())


@pytest.mark.parametrize("kernel", VECTOR)
@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=60, deadline=None)
@given(FLOATS, SKEWS)
def test_quantiser_equals_scalar(kernel, fused, x, skew):
    q, scale, total = _native.quantize(unaligned(x, skew), fused=fused, kernel=kernel)
    q0, scale0, total0 = _native.quantize(x, fused=fused, kernel="scalar")
    np.testing.assert_array_equal(q, q0)
    assert (scale, total) == (scale0, total0)


@pytest.mark.parametrize("kernel", VECTOR)
def test_quantiser_equals_scalar_at_rounding_ties(kernel):
    # multiples of half a step: with absmax 127 the scale is 1 and every second value is an exact tie
    x = (np.arange(-254, 255, dtype=np.float32) / 2).astype(np.float32)
    np.testing.assert_array_equal(_native.quantize(x, kernel=kernel)[0], np.rint(x).astype(np.int8))
    np.testing.assert_array_equal(_native.quantize(x, kernel="scalar")[0], np.rint(x).astype(np.int8))


def test_fused_quantiser_differs_from_the_unfused_one_somewhere():
    rng = np.random.default_rng(0)
    differing = 0
    for _ in range(400):
        x = rng.standard_normal(2560).astype(np.float32)
        differing += int((_native.quantize(x)[0] != _native.quantize(x, fused=True)[0]).sum())
    assert differing > 0  # about one element per 330 such rows


def half_case(seed: int, rows: int, n: int, cols: int | None = None):
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((rows, n)) * 2.0 ** rng.integers(-8, 8)).astype(np.float16)
    b = rng.standard_normal(n if cols is None else (cols, n)).astype(np.float16).astype(np.float32)
    return a, b


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 300), WIDTHS)
def test_scalar_dot_is_within_the_bound_of_its_reduction(seed, rows, n, width):
    a, b = half_case(seed, rows, n)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    terms = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    # each term passes at most n/(4 width) fused steps, a tree of log2(4 width) levels and one final rounding
    steps = n / (4 * width) + np.log2(4 * width) + 2
    got = _native.dots(a, b, simd_width=width, tiled=False, kernel="scalar")
    assert (np.abs(got - exact) <= steps * 2.0**-24 * terms * 1.01 + 1e-40).all()


LENGTHS = st.integers(1, 300) | st.integers(1000, 2200)
"""Beyond 1024 elements several columns are taken in stretches."""


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=120, deadline=None)
@given(SEEDS, st.integers(1, 9), LENGTHS, st.integers(1, 9), WIDTHS, st.booleans(), SKEWS)
def test_dots_equal_scalar(kernel, seed, rows, n, cols, width, tiled, skew):
    if tiled:
        n = (n + 15) // 16 * 16
    a, b = half_case(seed, rows, n, cols)
    arguments = {"simd_width": width, "tiled": tiled}
    got = _native.dots(unaligned(a, skew), unaligned(b, skew * 5 % 64), kernel=kernel, **arguments)
    one_by_one = [_native.dots(a, column, kernel="scalar", **arguments) for column in b]
    assert_same_bits(got, np.array(one_by_one))
    assert_same_bits(_native.dots(a, b, kernel="scalar", **arguments), got)


def test_the_two_widths_and_the_two_shapes_differ_somewhere():
    a, b = half_case(3, 64, 256)
    results = [
        _native.dots(a, b, simd_width=width, tiled=tiled, kernel="scalar") for width in (8, 16) for tiled in (0, 1)
    ]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert (bits(one) != bits(other)).any()


SCORES = st.builds(
    lambda seed, n, spread: (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32),
    SEEDS,
    st.integers(1, 150),
    st.sampled_from([0.01, 1.0, 30.0, 120.0, 3000.0]),
)


@settings(max_examples=80, deadline=None)
@given(SCORES, WIDTHS)
def test_scalar_softmax_is_close_to_float64_and_masks_exactly(scores, width):
    padded = (scores.size + 31) // 32 * 32
    got = _native.softmax(scores, n_padded=padded, scale=0.125, simd_width=width, kernel="scalar")
    exact = np.exp(scores.astype(np.float64) * 0.125 - (scores.astype(np.float64) * 0.125).max())
    exact /= exact.sum()
    np.testing.assert_allclose(got[: scores.size], exact, rtol=1e-4, atol=1e-37)
    assert (bits(got[scores.size :]) == 0).all()


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=150, deadline=None)
@given(SCORES, WIDTHS)
def test_softmax_equals_scalar(kernel, scores, width):
    arguments = {"n_padded": (scores.size + 31) // 32 * 32 + 32, "scale": 0.125, "simd_width": width}
    assert_same_bits(
        _native.softmax(scores, kernel=kernel, **arguments), _native.softmax(scores, kernel="scalar", **arguments)
    )


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 70), SKEWS)
def test_rope_equals_scalar(kernel, seed, half, skew):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(2 * half).astype(np.float32)
    angle = rng.uniform(0, 4000, half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    got = _native.rope(unaligned(x, skew), unaligned(cos, 1), unaligned(sin, 2), kernel=kernel)
    assert_same_bits(got, _native.rope(x, cos, sin, kernel="scalar"))


ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)
PAIRS = st.integers(1, 70).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float32, n, elements=ANY_FLOAT) for _ in range(2)))
)


def assert_same_values(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bits but for NaN, whose payload no standard fixes."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert_same_bits(np.where(np.isnan(a), np.float32(0), a), np.where(np.isnan(b), np.float32(0), b))


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_gated_relu_squared_is_its_formula(kernel, pair):
    gate, up = pair
    act, prod = _native.gated_relu_squared(gate, up, kernel=kernel)
    with np.errstate(all="ignore"):
        relu = np.where(gate > 0, gate, np.float32(0))  # a NaN is not greater than 0
        expected = relu * relu
        assert_same_values(act, expected)
        assert_same_values(prod, expected * up)


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 70), st.integers(-(10**6), 10**6), st.floats(2.0**-20, 2.0**20, width=32))
def test_rescale_is_its_formula_in_binary32(kernel, seed, n, total, scale):
    acc = np.random.default_rng(seed).integers(-(2**24), 2**24, n).astype(np.int32)
    got = _native.rescale(acc, total, scale, 0.37, kernel=kernel)
    expected = (acc.astype(np.float32) - np.float32(total)) / np.float32(scale) * np.float32(0.37)
    assert_same_bits(got, expected)


def every_half() -> np.ndarray:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return values[~np.isnan(values)]


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 70), SKEWS)
def test_half_conversions_equal_scalar_at_odd_lengths(kernel, seed, n, skew):
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    half = x.astype(np.float16)
    assert_same_bits(_native.to_f16(unaligned(x, skew), kernel=kernel), half)
    assert_same_bits(_native.from_f16(unaligned(half, skew), kernel=kernel), half.astype(np.float32))


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
def test_from_f16_is_exact_for_every_value(kernel):
    values = every_half()
    assert_same_bits(_native.from_f16(values, kernel=kernel), values.astype(np.float32))


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
def test_to_f16_rounds_to_nearest_even_around_every_value(kernel):
    values = every_half().astype(np.float32)
    finite = values[np.isfinite(values)]
    finite = finite[np.abs(finite) < 65504]
    steps = np.spacing(finite.astype(np.float16)).astype(np.float32)
    gaps = finite[:, None] + np.float32([0, 0.5]) * steps[:, None]
    ties = np.concatenate([gaps.ravel(), np.nextafter(gaps.ravel(), np.inf), np.nextafter(gaps.ravel(), -np.inf)])
    ties = np.concatenate([ties, np.float32([1e-10, 65504, 65519.99, 65520, 1e30, np.inf, -np.inf, 0.0, -0.0])])
    with np.errstate(over="ignore"):
        assert_same_bits(_native.to_f16(ties, kernel=kernel), ties.astype(np.float16))
