"""The probes distinguish the builds, and report when a library is of neither kind."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from crossval.bitnet_cpp import abi as llama_abi
from crossval.bitnet_cpp import main, march
from crossval.bitnet_cpp import probe as cpp_probe
from crossval.bitnet_cpp.table import ANY, Table


def library_with_dot(way: int | str | None, table: Table = march.TABLE, **traits: object) -> SimpleNamespace:
    """Return a fake library whose F16 dot product reduces in 8 or 16 lanes, in binary16, or in one long sum."""

    def vec_dot(n: int, result, _bs: int, x: int, _bx: int, y: int, _by: int, _nrc: int) -> None:
        rows = [
            np.ctypeslib.as_array((ctypes.c_uint16 * n).from_address(p)).view(np.float16)[None] for p in (x, y)
        ]
        if way is None:
            result[0] = float(np.sum(rows[0].astype(np.float64) * rows[1].astype(np.float64)))
        elif way == "binary16":
            result[0] = float(cpp_probe.dot16_in_binary16(rows[0], rows[1])[0])
        else:
            result[0] = float(cpp_probe.dot16(rows[0], rows[1], way)[0])

    function = llama_abi.VEC_DOT(vec_dot)
    assert table.dot is not None
    known = {name: value for name, _, value in table.dot.traits.fields if value is not ANY} | traits
    struct = table.dot.traits.struct(vec_dot=ctypes.cast(function, ctypes.c_void_p), **known)
    prepared = []

    def lookup(_type: int):
        return ctypes.pointer(struct) if prepared or table.dot.prepare is None else None

    symbols = {table.dot.lookup: lookup}
    if table.dot.prepare is not None:

        def prepare() -> None:
            prepared.append(True)

        symbols[table.dot.prepare] = prepare
    return SimpleNamespace(table=table, shared_object=SimpleNamespace(**symbols), keep=function)


BOTH = pytest.mark.parametrize("table", [march.TABLE, main.TABLE])


@BOTH
@pytest.mark.parametrize(
    ("way", "found"), [(8, (8, False)), (16, (16, False)), ("binary16", (16, True)), (None, (None, None))]
)
def test_the_reduction_shape_is_found(way, found, table):
    assert cpp_probe.dot_product(library_with_dot(way, table)) == found


@BOTH
@pytest.mark.parametrize(("way", "found"), [(8, False), (16, False), ("pairs", True), (None, None)])
def test_how_bfloat16_is_added_is_found(way, found, table):
    def vec_dot(n: int, result, _bs: int, x: int, _bx: int, y: int, _by: int, _nrc: int) -> None:
        bits = [np.ctypeslib.as_array((ctypes.c_uint16 * n).from_address(p)).astype(np.uint32) for p in (x, y)]
        rows = [(one << 16).view(np.float32)[None] for one in bits]
        if way is None:
            result[0] = float(np.sum(rows[0].astype(np.float64) * rows[1]))
        else:
            dot = cpp_probe.dot_bf16_in_pairs(*rows) if way == "pairs" else cpp_probe.dot_bf16(*rows, way)
            result[0] = float(dot[0])

    function = llama_abi.VEC_DOT(vec_dot)
    own = {"type_name": b"bf16"} if table is march.TABLE else {}
    library = library_with_dot(8, table, vec_dot_type=30, **own)
    struct = library.shared_object.__dict__[table.dot.lookup]
    if table.dot.prepare is not None:
        library.shared_object.__dict__[table.dot.prepare]()
    struct(30).contents.vec_dot = ctypes.cast(function, ctypes.c_void_p)
    assert cpp_probe.bfloat_pairs(library) is found
    assert cpp_probe.bfloat_pairs(library_with_dot(8, table)) is None  # traits of another type


def test_the_emulated_sums_of_bfloat16_differ():
    x, y = (np.asarray(array, np.float32) for array in cpp_probe.dot_inputs())
    found = [cpp_probe.dot_bf16(x, y, 8), cpp_probe.dot_bf16(x, y, 16), cpp_probe.dot_bf16_in_pairs(x, y)]
    exact = (x.astype(np.float64) * y).sum(axis=1)
    for one in found:
        np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-3)
    for one, other in combinations(found, 2):
        assert not np.array_equal(one, other)


@BOTH
def test_a_library_without_the_symbol_or_with_other_traits_is_of_no_known_width(table):
    without = SimpleNamespace(table=table, shared_object=SimpleNamespace())
    assert cpp_probe.dot_product(without) == (None, None)
    assert cpp_probe.dot_product(library_with_dot(8, table, vec_dot_type=0)) == (None, None)
    assert cpp_probe.dot_product(SimpleNamespace(table=replace(table, dot=None))) == (None, None)


def test_the_probe_has_power():
    x, y = cpp_probe.dot_inputs()
    ways = [cpp_probe.dot16(x, y, 8), cpp_probe.dot16(x, y, 16), cpp_probe.dot16_in_binary16(x, y)]
    for one, other in combinations(ways, 2):
        assert np.count_nonzero(one != other) > len(x) // 3
    row, separate, fused = cpp_probe.quantizer_row("even")
    _, away, _ = cpp_probe.quantizer_row("away")
    assert row.max() == 1.0
    for one, other in combinations((separate, fused, away), 2):
        assert np.count_nonzero(one != other) > 50


def test_binary16_sums_round_after_every_product():
    """Against exact rational arithmetic, rounded once per step."""
    x, y = (array[:1] for array in cpp_probe.dot_inputs())
    lanes = np.zeros((4, 32), np.float16)
    for step in range(0, x.shape[1], 128):
        for a in range(4):
            for i in range(32):
                at = step + 32 * a + i
                exact = Fraction(float(x[0, at])) * Fraction(float(y[0, at])) + Fraction(float(lanes[a, i]))
                lanes[a, i] = nearest_binary16(exact)
    sums = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    assert cpp_probe.dot16_in_binary16(x, y)[0] == np.float32(sums[0])


def nearest_binary16(exact: Fraction) -> np.float16:
    """Return the binary16 number nearest to a rational number that is no tie."""
    first = np.float16(float(exact))
    candidates = [np.nextafter(first, np.float16(-np.inf)), first, np.nextafter(first, np.float16(np.inf))]
    return min(candidates, key=lambda value: abs(Fraction(float(value)) - exact))


def test_the_emulated_dot_product_is_one():
    x, y = cpp_probe.dot_inputs()
    exact = np.sum(x.astype(np.float64) * y.astype(np.float64), axis=1)
    scale = np.sum(np.abs(x.astype(np.float64) * y.astype(np.float64)), axis=1)
    for width in (8, 16):
        assert np.max(np.abs(cpp_probe.dot16(x, y, width) - exact) / scale) < 1e-6


def library_with_quantizer(
    table: Table,
    round_product: bool = True,
    ties: str | None = None,
    scale: float = 127.0,
    zeros: float | None = None,
    total_off: int = 0,
) -> SimpleNamespace:
    assert table.quantizer is not None
    of_zeros = table.quantizer.scale_of_zeros if zeros is None else zeros

    def quantize(source: int, target: int, n: int, scale_out, total_out) -> None:
        row = np.ctypeslib.as_array((ctypes.c_float * n).from_address(source)).astype(np.float64)
        product = row * 127.0
        if round_product:
            product = product.astype(np.float32).astype(np.float64)
        result = np.ctypeslib.as_array((ctypes.c_int8 * n).from_address(target))
        result[:] = cpp_probe.round_ties(product, ties or table.quantizer.ties)
        scale_out._obj.value, total_out._obj.value = (
            scale if row.any() else of_zeros,
            int(result.sum()) + total_off,
        )

    return SimpleNamespace(table=table, shared_object=SimpleNamespace(quantize_row_i8_s=quantize))


@BOTH
def test_the_quantizers_rounding_is_found(table):
    assert cpp_probe.fused_quantizer(library_with_quantizer(table)) is False
    fused = cpp_probe.fused_quantizer(library_with_quantizer(table, round_product=False))
    assert fused is (True if table is march.TABLE else None)


@BOTH
def test_a_quantizer_that_is_not_the_generations_own_is_unknown(table):
    other = {"even": "away", "away": "even"}[table.quantizer.ties]
    for changed in ({"ties": other}, {"scale": 1 / 127}, {"zeros": 1.0}, {"total_off": 1}):
        assert cpp_probe.fused_quantizer(library_with_quantizer(table, **changed)) is None
    assert cpp_probe.fused_quantizer(SimpleNamespace(table=table, shared_object=SimpleNamespace())) is None
