"""The probes distinguish the builds, and report when a library is of neither kind."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from crossval.bitnet_cpp import abi as llama_abi
from crossval.bitnet_cpp import probe as cpp_probe


def library_with_dot(width: int | None, **traits: object) -> SimpleNamespace:
    """Return a fake library whose F16 dot product reduces in ``width`` lanes (None: in one long sum)."""

    def vec_dot(n: int, result, _bs: int, x: int, _bx: int, y: int, _by: int, _nrc: int) -> None:
        rows = [
            np.ctypeslib.as_array((ctypes.c_uint16 * n).from_address(p)).view(np.float16)[None] for p in (x, y)
        ]
        if width is None:
            result[0] = float(np.sum(rows[0].astype(np.float64) * rows[1].astype(np.float64)))
        else:
            result[0] = float(cpp_probe.dot16(rows[0], rows[1], width)[0])

    function = llama_abi.VEC_DOT(vec_dot)
    known = {"type_name": b"f16", "blck_size": 1, "type_size": 2, "vec_dot_type": 1, "nrows": 1, **traits}
    struct = llama_abi.TypeTraits(vec_dot=ctypes.cast(function, ctypes.c_void_p), **known)

    def lookup(_type: int):
        return ctypes.pointer(struct)

    return SimpleNamespace(ggml_get_type_traits=lookup, keep=function)


@pytest.mark.parametrize("width", [8, 16, None])
def test_the_reduction_shape_is_found(width):
    assert cpp_probe.simd_width(library_with_dot(width)) == width


def test_a_library_without_the_symbol_or_with_other_traits_is_of_no_known_width():
    assert cpp_probe.simd_width(SimpleNamespace()) is None
    assert cpp_probe.simd_width(library_with_dot(8, type_name=b"q4_0")) is None


def test_the_probe_has_power():
    x, y = cpp_probe.dot_inputs()
    assert np.count_nonzero(cpp_probe.dot16(x, y, 8) != cpp_probe.dot16(x, y, 16)) > len(x) // 3
    row, separate, fused = cpp_probe.quantizer_row()
    assert row.max() == 1.0
    assert np.count_nonzero(separate != fused) > 50


def test_the_emulated_dot_product_is_one():
    x, y = cpp_probe.dot_inputs()
    exact = np.sum(x.astype(np.float64) * y.astype(np.float64), axis=1)
    scale = np.sum(np.abs(x.astype(np.float64) * y.astype(np.float64)), axis=1)
    for width in (8, 16):
        assert np.max(np.abs(cpp_probe.dot16(x, y, width) - exact) / scale) < 1e-6


def library_with_quantizer(round_product: bool, scale: float = 127.0) -> SimpleNamespace:
    def quantize(source: int, target: int, n: int, scale_out, total_out) -> None:
        row = np.ctypeslib.as_array((ctypes.c_float * n).from_address(source)).astype(np.float64)
        product = row * 127.0
        if round_product:
            product = product.astype(np.float32).astype(np.float64)
        result = np.ctypeslib.as_array((ctypes.c_int8 * n).from_address(target))
        result[:] = np.rint(product).astype(np.int8)
        scale_out._obj.value, total_out._obj.value = scale, int(result.sum())

    return SimpleNamespace(quantize_row_i8_s=quantize)


def test_the_quantizers_rounding_is_found():
    assert cpp_probe.fused_quantizer(library_with_quantizer(round_product=True)) is False
    assert cpp_probe.fused_quantizer(library_with_quantizer(round_product=False)) is True
    assert cpp_probe.fused_quantizer(library_with_quantizer(round_product=True, scale=1 / 127)) is None
    assert cpp_probe.fused_quantizer(SimpleNamespace()) is None
