"""GELU by ggml's table: every entry, what is outside of it, and how far it is from the function."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py import _kernels
from tests.support.families import FAMILIES
from tests.support.numpy_main import kernels as numpy_main

RECORDED = "941d5b3ccda9cd5ca0a10eb534559bb12b9a4512387d4ba59e4532bb9644d812"
"""sha256 of main's table, of an AVX2 build with glibc 2.36, where ``|x|`` is below 10."""
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
FLOATS = hnp.arrays(np.float32, st.integers(1, 70), elements=st.floats(width=32, allow_nan=False))


def gelu(gate, kernel=None):
    return _kernels.gated(gate, np.ones_like(gate), activation="gelu", kernel=kernel)[0]


@pytest.mark.parametrize("kernel", [*FAMILIES, "scalar"])
def test_every_entry(kernel):
    inside = HALVES[np.abs(HALVES) < 10]
    assert inside.size == 2 * 0x4900
    found, _ = numpy_main.gelu(inside, np.ones_like(inside))
    assert gelu(inside, kernel).tobytes() == found.tobytes()


@pytest.mark.skipif(
    os.confstr("CS_GNU_LIBC_VERSION") != "glibc 2.36",
    reason="the table's tanhf is the C library's, and this is not glibc 2.36",
)
def test_the_table_of_bitnet_cpp():
    inside = HALVES[np.abs(HALVES) < 10]
    assert hashlib.sha256(gelu(inside).astype(np.float16).tobytes()).hexdigest() == RECORDED


@settings(max_examples=200, deadline=None)
@given(FLOATS, st.floats(2.0**-20, 1.0))
def test_any_input(gate, scale):
    up = (gate * np.float32(scale)).astype(np.float32)
    for kernel in FAMILIES:
        with np.errstate(all="ignore"):
            found, expected = _kernels.gated(gate, up, activation="gelu", kernel=kernel), numpy_main.gelu(gate, up)
        for one, other in zip(found, expected, strict=True):
            assert ((one.view(np.uint32) == other.view(np.uint32)) | (np.isnan(one) & np.isnan(other))).all()


def test_outside_of_the_table():
    gate = np.array([-np.inf, -1e30, -10.000001, -10, 10, 10.000001, 3e38, np.inf, np.nan], np.float32)
    found = gelu(gate)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4:8].tobytes() == gate[4:8].tobytes()
    assert np.isnan(found[8])


def test_distance_from_the_function():
    """A value is rounded to binary16 twice: before, where the slope is at most 1.13, and after."""
    gate = np.linspace(-9.99, 9.99, 40001).astype(np.float32)
    wide = gate.astype(np.float64)
    exact = 0.5 * wide * (1 + np.tanh(0.7978845608028654 * wide * (1 + 0.044715 * wide**2)))
    half = 2.0**-11
    allowed = 1.13 * half * np.abs(wide) + 1.001 * half * np.abs(exact) + 2.0**-24
    assert (np.abs(gelu(gate) - exact) <= allowed).all()
