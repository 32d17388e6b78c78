"""Every kernel family against the scalar specification (bit-identical), and the scalar one against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py import _kernels, _native

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
    """Return a contiguous copy that starts ``skew`` items after an address aligned to 64 bytes."""
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
    np.testing.assert_array_equal(_kernels.i2s_dot(pack(codes), x, kernel="scalar"), expected)


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
    np.testing.assert_array_equal(_kernels.i2s_dot(packed, x, kernel=kernel), expected)


FLOATS = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
)


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_scalar_quantiser_is_bitnet_cpps_formula(x):
    q, scale, total = _kernels.quantize(x, kernel="scalar")
    expected_scale = np.float32(127.0 / max(1e-5, float(np.abs(x).max())))
    assert scale == expected_scale
    expected = np.clip(np.rint(x * expected_scale), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(q, expected)
    assert total == int(expected.astype(np.int64).sum())


@pytest.mark.parametrize("kernel", VECTOR)
@pytest.mark.parametrize("quantizer", _kernels.QUANTIZERS)
@settings(max_examples=60, deadline=None)
@given(FLOATS, SKEWS)
def test_quantiser_equals_scalar(kernel, quantizer, x, skew):
    q, scale, total = _kernels.quantize(unaligned(x, skew), quantizer=quantizer, kernel=kernel)
    q0, scale0, total0 = _kernels.quantize(x, quantizer=quantizer, kernel="scalar")
    np.testing.assert_array_equal(q, q0)
    assert (scale, total) == (scale0, total0)


@pytest.mark.parametrize("kernel", VECTOR)
def test_quantiser_equals_scalar_at_rounding_ties(kernel):
    # multiples of half a step: with absmax 127 the scale is 1 and every second value is an exact tie
    x = (np.arange(-254, 255, dtype=np.float32) / 2).astype(np.float32)
    np.testing.assert_array_equal(_kernels.quantize(x, kernel=kernel)[0], np.rint(x).astype(np.int8))
    np.testing.assert_array_equal(_kernels.quantize(x, kernel="scalar")[0], np.rint(x).astype(np.int8))


def test_fused_quantiser_differs_from_the_unfused_one_somewhere():
    rng = np.random.default_rng(0)
    differing = 0
    for _ in range(400):
        x = rng.standard_normal(2560).astype(np.float32)
        differing += int((_kernels.quantize(x)[0] != _kernels.quantize(x, quantizer="march_fused")[0]).sum())
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
    got = _kernels.dots(a, b, simd_width=width, shape="dot", kernel="scalar")
    assert (np.abs(got - exact) <= steps * 2.0**-24 * terms * 1.01 + 1e-40).all()


LENGTHS = st.integers(1, 300) | st.integers(1000, 2200)
"""Beyond 1024 elements several columns are taken in stretches."""


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=120, deadline=None)
@given(SEEDS, st.integers(1, 9), LENGTHS, st.integers(1, 9), WIDTHS, st.sampled_from(_kernels.DOT_SHAPES), SKEWS)
def test_dots_equal_scalar(kernel, seed, rows, n, cols, width, shape, skew):
    if shape == "tiled":
        n = (n + 15) // 16 * 16
    a, b = half_case(seed, rows, n, cols)
    arguments = {"simd_width": width, "shape": shape}
    got = _kernels.dots(unaligned(a, skew), unaligned(b, skew * 5 % 64), kernel=kernel, **arguments)
    one_by_one = [_kernels.dots(a, column, kernel="scalar", **arguments) for column in b]
    assert_same_bits(got, np.array(one_by_one))
    assert_same_bits(_kernels.dots(a, b, kernel="scalar", **arguments), got)


def test_the_two_widths_and_the_shapes_differ_somewhere():
    a, b = half_case(3, 64, 256)
    results = [
        _kernels.dots(a, b, simd_width=width, shape=shape, kernel="scalar")
        for width, shape in [*itertools.product((8, 16), ("dot", "tiled")), (16, "half_sums")]
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
    got = _kernels.softmax(scores, n_padded=padded, scale=0.125, simd_width=width, kernel="scalar")
    exact = np.exp(scores.astype(np.float64) * 0.125 - (scores.astype(np.float64) * 0.125).max())
    exact /= exact.sum()
    np.testing.assert_allclose(got[: scores.size], exact, rtol=1e-4, atol=1e-37)
    assert (bits(got[scores.size :]) == 0).all()


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=150, deadline=None)
@given(SCORES, WIDTHS)
def test_softmax_equals_scalar(kernel, scores, width):
    arguments = {"n_padded": (scores.size + 31) // 32 * 32 + 32, "scale": 0.125, "simd_width": width}
    expected = _kernels.softmax(scores, kernel="scalar", **arguments)
    assert_same_bits(_kernels.softmax(scores, kernel=kernel, **arguments), expected)


def rope_case(seed: int, half: int):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 4000, half)
    x = rng.standard_normal(2 * half).astype(np.float32)
    return x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("pairing", _native.ROPE_PAIRINGS)
@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 70), SKEWS)
def test_rope_equals_scalar(kernel, pairing, seed, half, skew):
    x, cos, sin = rope_case(seed, half)
    got = _kernels.rope(unaligned(x, skew), unaligned(cos, 1), unaligned(sin, 2), pairing=pairing, kernel=kernel)
    assert_same_bits(got, _kernels.rope(x, cos, sin, pairing=pairing, kernel="scalar"))


@pytest.mark.parametrize("pairing", _native.ROPE_PAIRINGS)
@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 70))
def test_scalar_rope_is_within_the_bound_of_its_formula(pairing, seed, half):
    x, cos, sin = rope_case(seed, half)
    first, second = {
        "halves": (slice(0, half), slice(half, None)),
        "adjacent": (slice(0, None, 2), slice(1, None, 2)),
    }[pairing]
    got = _kernels.rope(x, cos, sin, pairing=pairing, kernel="scalar").astype(np.float64)
    a, b, c, s = (values.astype(np.float64) for values in (x[first], x[second], cos, sin))
    u = 2.0**-24  # one product is rounded, then the sum: the other product is exact inside the fused operation
    for found, exact, rounded in ((got[first], a * c - b * s, b * s), (got[second], a * s + b * c, b * c)):
        assert np.all(np.abs(found - exact) <= u * (np.abs(exact) + (1 + u) * np.abs(rounded)) + 2.0**-149)


ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)
PAIRS = st.integers(1, 70).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float32, n, elements=ANY_FLOAT) for _ in range(2)))
)


def assert_same_values(a: np.ndarray, b: np.ndarray) -> None:
    """Bit-identical except for NaN, whose payload no standard fixes."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert_same_bits(np.where(np.isnan(a), np.float32(0), a), np.where(np.isnan(b), np.float32(0), b))


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_gated_relu_squared_is_its_formula(kernel, pair):
    gate, up = pair
    act, prod = _kernels.gated(gate, up, activation="relu_squared", kernel=kernel)
    with np.errstate(all="ignore"):
        relu = np.where(gate > 0, gate, np.float32(0))  # a NaN is not greater than 0
        expected = relu * relu
        assert_same_values(act, expected)
        assert_same_values(prod, expected * up)


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=50, deadline=None)
@given(PAIRS)
def test_gated_silu_equals_scalar(kernel, pair):
    found = _kernels.gated(*pair, activation="silu", kernel=kernel)
    for one, expected in zip(found, _kernels.gated(*pair, activation="silu", kernel="scalar"), strict=True):
        assert_same_values(one, expected)


def assert_silu(gate: np.ndarray, up: np.ndarray) -> None:
    """Check the scalar SiLU against float64 within the error that its rounding order allows.

    The exponential is within 2 units in the last place (bitnet.cpp, ggml_v_expf: 1.45 + 0.5), at most 4 u of its
    value. The sum 1 + e keeps that and rounds once more, and so does the quotient: 6 u, and less than 7 u with the
    products of these. An exponential above the largest float32 is infinite and gives -0, one below the smallest
    normal gives 0: at most 2.7e-37 of the exact value is lost.
    """
    act, prod = _kernels.gated(gate, up, activation="silu", kernel="scalar")
    with np.errstate(over="ignore"):
        wide = gate.astype(np.float64)
        exact = wide / (1 + np.exp(-wide))
    assert np.all(np.abs(act - exact) <= 7 * 2.0**-24 * np.abs(exact) + 2.7e-37)
    with np.errstate(over="ignore"):
        assert_same_bits(prod, act * up)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70).flatmap(lambda n: hnp.arrays(np.float32, n, elements=st.floats(-120, 120, width=32))))
def test_scalar_silu_is_within_the_bound_of_its_formula(gate):
    assert_silu(gate, np.float32(0.37) * gate[::-1].copy())


def test_scalar_silu_over_its_whole_range():
    gate = np.linspace(-110, 110, 400001, dtype=np.float32)
    assert_silu(gate, np.ones_like(gate))
    extremes = np.array([-3e38, -104, -88.8, -88.7, -0.0, 0.0, 1e-45, -1e-45, 88.8, 3e38], np.float32)
    assert_silu(extremes, np.ones_like(extremes))


def test_scalar_silu_of_what_is_not_finite():
    act, _ = _kernels.gated(np.array([np.nan, np.inf], np.float32), np.ones(2, np.float32), activation="silu")
    assert np.isnan(act[0])
    assert np.isposinf(act[1])


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 70), st.integers(-(10**6), 10**6), st.floats(2.0**-20, 2.0**20, width=32))
def test_rescale_is_its_formula_in_binary32(kernel, seed, n, total, scale):
    acc = np.random.default_rng(seed).integers(-(2**24), 2**24, n).astype(np.int32)
    got = _kernels.rescale(acc, total, scale, 0.37, kernel=kernel)
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
    assert_same_bits(_kernels.to_f16(unaligned(x, skew), kernel=kernel), half)
    assert_same_bits(_kernels.from_f16(unaligned(half, skew), kernel=kernel), half.astype(np.float32))


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
def test_from_f16_is_exact_for_every_value(kernel):
    values = every_half()
    assert_same_bits(_kernels.from_f16(values, kernel=kernel), values.astype(np.float32))


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
        assert_same_bits(_kernels.to_f16(ties, kernel=kernel), ties.astype(np.float16))
