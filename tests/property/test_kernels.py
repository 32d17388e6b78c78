"""Every kernel family against the scalar specification (bit-identical), and the scalar one against NumPy."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py import Arithmetic, _kernels, _native
from tests.support.extra import examples
from tests.support.numpy_main import attention as numpy_attention
from tests.support.numpy_main import kernels as numpy_main

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


def assert_same_values(a: np.ndarray, b: np.ndarray) -> None:
    """Bit-identical except for NaN, whose payload no standard fixes."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert_same_bits(np.where(np.isnan(a), np.float32(0), a), np.where(np.isnan(b), np.float32(0), b))


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


def exact_product(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Every sum is a whole number below 2**53, so binary64 is exact; NumPy multiplies it far faster than int64."""
    return (x.astype(np.float64) @ codes.T.astype(np.float64)).astype(np.int64)


@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, st.integers(1, 19), st.integers(1, 67), st.integers(1, 21), st.booleans())
def test_scalar_i2s_dot_is_the_exact_integer(seed, rows, n_blocks, n_cols, extreme):
    codes, x = integer_case(seed, rows, min(n_blocks, 5), n_cols, extreme)
    expected = exact_product(x, codes)
    np.testing.assert_array_equal(_kernels.i2s_dot(pack(codes), x, kernel="scalar"), expected)


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=examples(80), deadline=None)
@given(
    SEEDS, st.integers(1, 19) | st.integers(30, 36), st.integers(1, 67), st.integers(1, 70), st.booleans(), SKEWS
)
def test_i2s_dot_equals_numpy_at_odd_sizes_and_extremes(kernel, seed, rows, n_blocks, n_cols, extreme, skew):
    codes, x = integer_case(seed, rows, n_blocks, n_cols, extreme)
    if extreme and codes[0, 0] == 3:
        codes[:] = 2  # 16-bit lanes are only promised for the codes that files hold
    expected = exact_product(x, codes)
    packed, x = unaligned(pack(codes), skew), unaligned(x, skew * 5 % 64)
    np.testing.assert_array_equal(_kernels.i2s_dot(packed, x, kernel=kernel), expected)


FLOATS = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
)


@settings(max_examples=examples(100), deadline=None)
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
@settings(max_examples=examples(60), deadline=None)
@given(FLOATS, SKEWS)
def test_quantiser_equals_scalar(kernel, quantizer, x, skew):
    q, scale, total = _kernels.quantize(unaligned(x, skew), quantizer=quantizer, kernel=kernel)
    q0, scale0, total0 = _kernels.quantize(x, quantizer=quantizer, kernel="scalar")
    np.testing.assert_array_equal(q, q0)
    assert (scale, total) == (scale0, total0)


ALL_KERNELS = [*VECTOR, "scalar"]


def assert_mains_quantiser(x: np.ndarray, kernel: str) -> None:
    q, scale, total = _kernels.quantize(x, quantizer="main", kernel=kernel)
    expected = numpy_main.quantise(x)
    np.testing.assert_array_equal(q, expected.values)
    assert (scale, total) == (expected.scale, expected.total)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(60), deadline=None)
@given(FLOATS)
def test_mains_quantiser_is_its_formula(kernel, x):
    assert_mains_quantiser(x, kernel)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_mains_quantiser_rounds_ties_away_from_zero_and_their_neighbours_to_the_nearest(kernel):
    ties = np.arange(-253, 254, 2, dtype=np.float32) / 2  # with an absmax of 127 the scale is 1
    for x, expected in (
        (ties, np.trunc(ties + np.copysign(0.5, ties))),
        (np.nextafter(ties, np.float32(0)), np.trunc(ties - np.copysign(0.5, ties))),
        (np.nextafter(ties, 2 * ties), np.trunc(ties + np.copysign(0.5, ties))),
    ):
        row = np.append(x, np.float32(127))
        assert_mains_quantiser(row, kernel)
        np.testing.assert_array_equal(
            _kernels.quantize(row, quantizer="main", kernel=kernel)[0][:-1], expected.astype(np.int8)
        )
    rng = np.random.default_rng(1)
    for scale in 10.0 ** np.arange(-30, 31, 3):
        assert_mains_quantiser((rng.standard_normal(2560) * scale).astype(np.float32), kernel)


NAN, INF = np.float32(np.nan), np.float32(np.inf)
LEAST = np.float32(127) / np.float32(np.finfo(np.float32).max)
"""About 3.73e-37: below it, 127 / x is infinite."""


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("n", [1, 7, 31, 32, 40, 96])
@pytest.mark.parametrize(
    ("values", "scale", "first"),
    [
        ([0], 0, 0), ([-0.0], 0, 0), ([LEAST / 2], INF, -128), ([-LEAST / 2], INF, -128), ([1e-45], INF, -128),
        ([LEAST * 1.01], None, 127), ([NAN], 0, -128), ([INF], 0, -128), ([-INF], 0, -128),
    ],
)  # fmt: skip
def test_mains_quantiser_where_there_is_no_scale(kernel, n, values, scale, first):
    x = np.resize(np.float32(values), n)
    q, found, total = _kernels.quantize(x, quantizer="main", kernel=kernel)
    assert scale is None or found == scale
    assert (q == first).all()
    assert total == n * first
    for other in (NAN, INF, np.float32(0), np.float32(1)):
        for at in (0, n // 2, n - 1):
            mixed = x.copy()
            mixed[at] = other
            assert_mains_quantiser(mixed, kernel)


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


@settings(max_examples=examples(60), deadline=None)
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
@settings(max_examples=examples(120), deadline=None)
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


@pytest.mark.parametrize("width", [8, 16])
@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 600), st.sampled_from(_kernels.DOT_SHAPES))
def test_scalar_dots_are_those_of_main_in_numpy(width, seed, rows, n, shape):
    arithmetic = Arithmetic("main", 16 if shape == "half_sums" else width, half_sums=shape == "half_sums")
    if shape == "tiled":
        n = (n + 15) // 16 * 16
    a, b = half_case(seed, rows, n)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (numpy_main.tiled if shape == "tiled" else numpy_main.dot)(a, b.astype(np.float16), arithmetic)
    got = _kernels.dots(a, b, simd_width=arithmetic.simd_width, shape=shape, kernel="scalar")
    assert_same_values(got, expected)


HALVES = st.integers(1, 70).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.uint16, n, elements=st.integers(0, 0xFFFF)) for _ in range(3)))
)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(200), deadline=None)
@given(HALVES)
def test_sums_in_binary16_round_once(kernel, halves):
    """Any binary16 values, subnormal, infinite and NaN: a row of 128 whose step holds a, another one b and c."""
    a, b, c = (np.resize(part, 128).view(np.float16) for part in halves)
    rows, columns = np.concatenate([c, a]), np.concatenate([np.ones(128, np.float16), b])
    got = _kernels.weigh_half(c.astype(np.float32), 1.0, a, float(b[0]), half_sums=True, kernel=kernel)
    with np.errstate(all="ignore"):
        assert_same_values(got, numpy_main.fused(a, b[0], c, np.float16).astype(np.float32))
        expected = numpy_main.dot(rows, columns, Arithmetic("main", 16, half_sums=True))
    found = _kernels.dots(rows[None], columns.astype(np.float32), simd_width=16, shape="half_sums", kernel=kernel)
    assert_same_values(found, np.array([expected]))


STEP = 2.0**-10
ROUNDED_TWICE = np.array(
    [
        (sign * (1 + STEP), (1 - STEP) * STEP / 2 * size, sign * c * size)
        for sign in (1, -1)
        for c, size in ((1 + STEP, 1), (1 + 3 * STEP, 2.0**-3))
    ]
    + [(sign * 1036 * STEP, 1012 * STEP * STEP / 2, sign * (1 + STEP)) for sign in (1, -1)],
    np.float16,
)
"""a * b is a little less than half a step of c, which is odd: rounded to binary32 first, the sum is a tie; of the
last two the odd neighbour of a tie, which has to stay."""


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_no_sum_in_binary16_is_rounded_twice(kernel):
    for a, b, c in ROUNDED_TWICE:
        row = np.full(256, a)
        got = _kernels.weigh_half(np.full(256, c, np.float32), 1.0, row, float(b), half_sums=True, kernel=kernel)
        np.testing.assert_array_equal(got, np.float32(c))
        lane = np.concatenate([np.eye(1, 128, 5)[0] * c, np.eye(1, 128, 5)[0] * a])
        factors = np.concatenate([np.ones(128), np.full(128, b)]).astype(np.float32)
        dot = _kernels.dots(
            lane.astype(np.float16)[None], factors, simd_width=16, shape="half_sums", kernel=kernel
        )
        np.testing.assert_array_equal(dot, np.float32(c))


def exact_sum(a: np.float16, b: np.float16, c: np.float16) -> np.float16:
    """Round a * b + c once, by fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float16(float(exact))  # within one step of the right value: float() rounds once more
    candidates = [near, np.nextafter(near, np.float16(np.inf)), np.nextafter(near, np.float16(-np.inf))]
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint16)) & 1))


def test_numpys_sum_in_binary16_is_the_exact_sum_rounded_once():
    """The statement itself, on sums that rounding twice gets wrong and on random ones."""
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        cases = rng.integers(0, 0x7C00, (4000, 3)).astype(np.uint16).view(np.float16)
        cases[::2] *= np.float16(-1)
        cases[:1000] = (rng.standard_normal((1000, 3)) * [1, 1, 30]).astype(np.float16)
        cases[1000 : 1000 + len(ROUNDED_TWICE)] = ROUNDED_TWICE
        a, b, c = cases[np.isfinite(cases).all(1)].T
        got = numpy_main.fused(a, b, c, np.float16)
        twice = (a.astype(np.float32) * b.astype(np.float32) + c.astype(np.float32)).astype(np.float16)
    finite = np.abs(got) < 60000
    expected = [exact_sum(*one) for one in zip(a[finite], b[finite], c[finite], strict=True)]
    np.testing.assert_array_equal(got[finite], np.array(expected))
    assert (got[finite] != twice[finite]).any()


@pytest.mark.parametrize("half_sums", [False, True])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(80), deadline=None)
@given(SEEDS, st.integers(1, 300), st.floats(0, 1, width=32) | st.just(1.0), st.floats(0, 1, width=32), SKEWS)
def test_a_cell_of_flash_attention_is_its_formula(kernel, half_sums, seed, n, factor, weight, skew):
    rng = np.random.default_rng(seed)
    v, a = (rng.standard_normal(n) * 3).astype(np.float16), (rng.standard_normal(n) * 3).astype(np.float16)
    got = _kernels.weigh_half(
        a.astype(np.float32), factor, unaligned(v, skew), weight, half_sums=half_sums, kernel=kernel
    )
    arithmetic = Arithmetic("main", 16, half_sums=half_sums)
    numbers = (np.float32([factor]), v[None], np.float32([weight]))
    assert_same_bits(got, numpy_attention.weigh(a[None], *numbers, arithmetic)[0].astype(np.float32))


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(40), deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), SKEWS)
def test_multiply_add_is_its_formula(kernel, seed, n_rows, k, n, skew):
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((n_rows, k), (k, n), (n_rows, n)))
    expected = c
    for i in range(k):
        expected = numpy_main.fused(b[i], a[:, i, None], expected)
    assert_same_bits(_kernels.multiply_add(a, unaligned(b, skew), c, kernel=kernel), expected)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(60), deadline=None)
@given(SEEDS, st.integers(1, 9), st.sampled_from([0.1, 5.0, 60.0, 200.0]))
def test_exponentials_are_their_formula(kernel, width, seed, n_groups, spread):
    row = (np.random.default_rng(seed).standard_normal(width * n_groups) * spread).astype(np.float32)
    row[seed % row.size] = (-np.inf, np.nan, 88.72, -88.72)[seed % 4]
    top = np.float32(np.nanmax(row)) if seed % 3 else np.float32(0)
    got, total = _kernels.exponentials(row, float(top), simd_width=width, kernel=kernel)
    expected, sums = numpy_main.exponentials(row, top, width)
    assert_same_values(got, expected)
    assert total == sums or (np.isnan(total) and np.isnan(sums))


SCORES = st.builds(
    lambda seed, n, spread: (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32),
    SEEDS,
    st.integers(1, 150),
    st.sampled_from([0.01, 1.0, 30.0, 120.0, 3000.0]),
)


@settings(max_examples=examples(80), deadline=None)
@given(SCORES, WIDTHS)
def test_scalar_softmax_is_close_to_float64_and_masks_exactly(scores, width):
    padded = (scores.size + 31) // 32 * 32
    got = _kernels.softmax(scores, n_padded=padded, scale=0.125, simd_width=width, kernel="scalar")
    exact = np.exp(scores.astype(np.float64) * 0.125 - (scores.astype(np.float64) * 0.125).max())
    exact /= exact.sum()
    np.testing.assert_allclose(got[: scores.size], exact, rtol=1e-4, atol=1e-37)
    assert (bits(got[scores.size :]) == 0).all()


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=examples(150), deadline=None)
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
@settings(max_examples=examples(40), deadline=None)
@given(SEEDS, st.integers(1, 70), SKEWS)
def test_rope_equals_scalar(kernel, pairing, seed, half, skew):
    x, cos, sin = rope_case(seed, half)
    got = _kernels.rope(unaligned(x, skew), unaligned(cos, 1), unaligned(sin, 2), pairing=pairing, kernel=kernel)
    assert_same_bits(got, _kernels.rope(x, cos, sin, pairing=pairing, kernel="scalar"))


@pytest.mark.parametrize("pairing", _native.ROPE_PAIRINGS)
@settings(max_examples=examples(100), deadline=None)
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


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
@settings(max_examples=examples(150), deadline=None)
@given(PAIRS)
def test_gated_relu_squared_is_its_formula(kernel, pair):
    gate, up = pair
    act, prod = _kernels.gated(gate, up, activation="relu_squared", kernel=kernel)
    with np.errstate(all="ignore"):
        relu = np.where(gate > 0, gate, np.float32(0))  # a NaN is not greater than 0
        expected = relu * relu
        assert_same_values(act, expected)
        assert_same_values(prod, expected * up)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("kernel", ALL_KERNELS)
@settings(max_examples=examples(80), deadline=None)
@given(PAIRS | st.builds(lambda x, scale: (x * np.float32(scale), x), FLOATS, st.floats(2.0**-100, 1.0)))
def test_gated_silu_is_mains(kernel, width, pair):
    found = _kernels.gated(*pair, activation="silu", simd_width=width, kernel=kernel)
    for one, expected in zip(found, numpy_main.gated(*pair, width), strict=True):
        assert_same_values(one, expected)


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("width", [8, 16])
def test_gated_silu_over_its_whole_range(kernel, width):
    gate = np.concatenate([np.linspace(-140, 140, 20001), np.linspace(-90, -85, 2001), np.linspace(85, 90, 2001)])
    gate, up = gate.astype(np.float32), np.full(gate.size, 0.37, np.float32)
    found = _kernels.gated(gate, up, activation="silu", simd_width=width, kernel=kernel)
    for one, expected in zip(found, numpy_main.gated(gate, up, width), strict=True):
        assert_same_bits(one, expected)


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


@settings(max_examples=examples(200), deadline=None)
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
@settings(max_examples=examples(150), deadline=None)
@given(SEEDS, st.integers(1, 70), st.integers(-(10**6), 10**6), st.floats(2.0**-20, 2.0**20, width=32))
def test_rescale_is_its_formula_in_binary32(kernel, seed, n, total, scale):
    acc = np.random.default_rng(seed).integers(-(2**24), 2**24, n).astype(np.int32)
    shifted, scale, weight_scale = acc.astype(np.float32) - np.float32(total), np.float32(scale), np.float32(0.37)
    expected = {"march": shifted / scale * weight_scale, "main": shifted * (weight_scale / scale)}
    for generation, values in expected.items():
        assert_same_bits(_kernels.rescale(acc, total, scale, 0.37, generation=generation, kernel=kernel), values)


@pytest.mark.parametrize("kernel", [*VECTOR, "scalar"])
def test_mains_rescale_without_a_scale(kernel):
    acc = np.arange(-5, 13, dtype=np.int32)
    for scale, factor in ((0.0, np.inf), (np.inf, 0)):
        got = _kernels.rescale(acc, 3, scale, 0.5, generation="main", kernel=kernel)
        with np.errstate(invalid="ignore"):
            assert_same_values(got, (acc - 3).astype(np.float32) * np.float32(factor))


def every_half() -> np.ndarray:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return values[~np.isnan(values)]


@pytest.mark.parametrize("kernel", VECTOR)
@settings(max_examples=examples(40), deadline=None)
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
