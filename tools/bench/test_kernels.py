"""Every kernel of the C library, families side by side: `make bench-kernels`.

Matrices and rows are those of the 2B-4T model, or long enough that the call through ctypes, about a
microsecond, does not matter. One thread. A rate is the work done, or the bytes read and written, divided
by the median time.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_float, c_int32

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bitnet_py import _kernels, _native
from bitnet_py.arithmetic import GENERATIONS
from tools.bench.conftest import Rates

FAMILIES = [f.name for f in _native.kernel_families() if f.available]
MATRICES = [(2560, 2560), (6912, 2560), (2560, 6912)]
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, rates: Rates) -> Callable[..., None]:
    """Return ``measure(operation, family, run, work, unit)``; ``unit`` means 1e9 of ``work`` per second."""

    def run_and_note(operation: str, family: str, run: Callable[[], object], work: float, unit: str) -> None:
        benchmark.group = operation
        benchmark(run)
        if benchmark.stats is None:  # --benchmark-disable
            return
        rate = work / benchmark.stats.stats.median / 1e9
        benchmark.extra_info[unit] = rate
        rates.setdefault(operation, {})[family] = f"{rate:.2f} {unit}"

    return run_and_note


def native(name: str, family: str, *arguments: object) -> Callable[[], None]:
    """Return a call of the C function; the addresses of its arrays are computed here, once."""
    function = getattr(_native.library(), name)
    ready = [_native.address(a) if isinstance(a, np.ndarray) else a for a in arguments]

    def run(_alive: object = arguments) -> None:
        assert function(family.encode(), *ready) == 0

    return run


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_cols", [1, 32], ids=["gemv", "gemm"])
@pytest.mark.parametrize(("rows", "k"), MATRICES)
def test_i2s_dot(measure, family, rows, k, n_cols):
    packed = RNG.choice(np.array([0x00, 0x15, 0x5A, 0xA5], np.uint8), (rows, k // 4))
    x = RNG.integers(-127, 128, (n_cols, k), dtype=np.int8)
    acc = np.empty((n_cols, rows), np.int32)
    run = native("bn_kernel_i2s_dot", family, packed, k, rows, x, n_cols, acc)
    name = f"i2s_dot {rows}x{k}" + (f" x{n_cols}" if n_cols > 1 else "")
    measure(name, family, run, rows * k * n_cols, "GMAC/s")


@pytest.mark.parametrize("quantizer", _kernels.QUANTIZERS)
def test_quantize(measure, family, quantizer):
    x, q, index = floats(6912), np.empty(6912, np.int8), _kernels.QUANTIZERS.index(quantizer)
    run = native("bn_kernel_quantize", family, index, x, x.size, q, byref(c_float()), byref(c_int32()))
    measure(f"quantize {quantizer}", family, run, x.nbytes + q.nbytes, "GB/s")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rescale(measure, family, generation):
    acc, out = RNG.integers(-9999, 9999, 6912).astype(np.int32), np.empty(6912, np.float32)
    numbers = (c_float(7), c_float(3.5), c_float(0.3))
    run = native("bn_kernel_rescale", family, GENERATIONS.index(generation), acc, acc.size, *numbers, out)
    measure(f"rescale {generation}", family, run, acc.nbytes + out.nbytes, "GB/s")


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("activation", _native.ACTIVATIONS)
def test_gated(measure, family, activation, width):
    gate, up, act, prod = floats(6912), floats(6912), floats(6912), floats(6912)
    index = _native.ACTIVATIONS.index(activation)
    run = native("bn_kernel_gated", family, width, index, gate, up, gate.size, act, prod)
    measure(f"gated {activation} w{width}", family, run, 4 * gate.nbytes, "GB/s")


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("shape", [0, 1], ids=["f16", "tiled"])
@pytest.mark.parametrize(("n", "n_cols"), [(2560, 1), (128, 4), (2048, 4)], ids=["head", "keys", "values"])
def test_dots(measure, family, width, shape, n, n_cols):
    a, b, out = floats(512, n).astype(np.float16), floats(n_cols, n), np.empty((n_cols, 512), np.float32)
    run = native("bn_kernel_dots", family, width, shape, a, n, 512, b, n, n_cols, n, out, 512)
    name = f"dots_{'tiled' if shape else 'f16'} w{width} 512x{n}" + (f" x{n_cols}" if n_cols > 1 else "")
    measure(name, family, run, a.size * n_cols, "GMAC/s")


def test_dots_half_sums(measure, family):
    a, b, out = floats(512, 2560).astype(np.float16), floats(2560), np.empty(512, np.float32)
    run = native("bn_kernel_dots", family, 16, 2, a, 2560, 512, b, 2560, 1, 2560, out, 512)
    measure("dots_half_sums 512x2560", family, run, a.size, "GMAC/s")


@pytest.mark.parametrize("half_sums", [0, 1])
def test_weigh_half(measure, family, half_sums):
    v, a = floats(4096).astype(np.float16), np.zeros(4096, np.float32)
    run = native("bn_kernel_weigh_half", family, half_sums, c_float(1), v, c_float(1e-4), v.size, a)
    measure(f"weigh_half{'_sums' if half_sums else ''}", family, run, v.size, "GMAC/s")


@pytest.mark.parametrize(("k", "n"), [(128, 64), (64, 128)], ids=["keys", "values"])
def test_multiply_add(measure, family, k, n):
    a, b, c = floats(64, k), floats(k, n), np.zeros((64, n), np.float32)
    run = native("bn_kernel_multiply_add", family, a, k, 64, b, k, n, c, n)
    measure(f"multiply_add 64x{k}x{n}", family, run, 64 * k * n, "GMAC/s")


@pytest.mark.parametrize("width", [8, 16])
def test_softmax(measure, family, width):
    row = floats(4096)  # in place: after the first round these are probabilities
    run = native("bn_kernel_softmax", family, width, row, row.size, row.size, 0.125)
    measure(f"softmax w{width}", family, run, 2 * row.nbytes, "GB/s")


def test_rope(measure, family):
    x, cos, sin, out = floats(16384), floats(8192), floats(8192), floats(16384)
    run = native("bn_kernel_rope", family, 0, x, cos, sin, cos.size, out)
    measure("rope", family, run, 3 * x.nbytes, "GB/s")


def test_to_f16(measure, family):
    x, out = floats(16384), np.empty(16384, np.float16)
    measure("to_f16", family, native("bn_kernel_to_f16", family, x, x.size, out), x.nbytes + out.nbytes, "GB/s")


def test_from_f16(measure, family):
    x, out = floats(16384).astype(np.float16), np.empty(16384, np.float32)
    measure(
        "from_f16", family, native("bn_kernel_from_f16", family, x, x.size, out), x.nbytes + out.nbytes, "GB/s"
    )
