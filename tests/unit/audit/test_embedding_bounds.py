"""Bounds of what embedding models add: main's results, stated independently, are inside, and nearly fill them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic
from crossval.model.kinds import Gelu, Kind, L2Norm, Pool, Scale
from crossval.model.taps import OPS
from crossval.passes import Numerics
from tests.support.numpy_main import kernels
from tests.support.numpy_main.engine import pooled

MAIN = Arithmetic(Numerics(8, False, generation="main"), 4)
TAP = {Gelu: "ffn_act", Scale: "q_scaled", Pool: "pooled", L2Norm: "embedding"}
F32 = npt.NDArray[np.float32]
BESIDE = np.float64(1 + 2.0**-26)
"""Less than binary32 can tell: no bound but of exact results leaves it out."""


def ratios(kind: Kind, recorded: npt.NDArray[Any], *inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the distance from the specification as multiples of the bound."""
    op = replace(OPS[TAP[type(kind)]], kind=kind)
    arrays = [array.astype(np.float64) if array.dtype == np.float32 else array for array in inputs]
    expected = kind.compute(*arrays)
    off, allowed = np.abs(recorded - expected), bounds.bound(op, arrays, expected, [], MAIN)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(off == 0, 0.0, off / allowed)


def normal(*shape: int) -> F32:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_gelu_by_table_fills_its_bound() -> None:
    gate = normal(40, 256) * 4
    table, _ = kernels.gelu(gate, np.ones_like(gate))
    found = ratios(Gelu(), table, gate)
    assert found.max() <= 1
    assert np.median(found) > 0.97  # but for entries that binary32 may round otherwise, the bound is the distance


def test_a_power_of_two_is_exact_and_another_constant_one_rounding() -> None:
    x = normal(30, 128)
    factor = float(np.float32(1 / np.sqrt(96)))
    found = ratios(Scale(factor), x * np.float32(factor), x)
    assert 0.9 < found.max() <= 1
    assert ratios(Scale(0.0625), x * np.float32(0.0625), x).max() == 0
    assert ratios(Scale(0.0625), x * 0.0625 * BESIDE, x).max() > 1


@pytest.mark.parametrize(("pooling", "least"), [("mean", 0.05), ("last", 0.0), ("cls", 0.0)])
def test_pooling(pooling: Any, least: float) -> None:
    states = normal(21, 128)
    one = pooled(states, pooling, 8).reshape(1, -1)
    found = ratios(Pool(pooling), one, states, np.array([20]))
    assert least <= found.max() <= 1
    if pooling != "mean":
        assert ratios(Pool(pooling), one * BESIDE, states, np.array([20])).max() > 1
    else:
        assert ratios(Pool(pooling), one * np.float32(21 / 20), states, np.array([20])).max() > 100


def test_the_norm_of_a_vector() -> None:
    x = normal(50, 640)
    scale = (1.0 / np.sqrt((x.astype(np.float64) ** 2).sum(axis=-1, keepdims=True))).astype(np.float32)
    found = ratios(L2Norm(), x * scale, x)
    assert 0.2 < found.max() <= 1
    assert ratios(L2Norm(), x, x).max() > 1e4
