"""A BitLinear with a bias and a second factor: correct engines are inside their bounds, small mistakes outside."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic
from crossval.audit.bounds.approx import exact
from crossval.formats import to_bf16
from crossval.model.kinds import BitLinear, TernaryMatrix
from crossval.model.op import Op
from crossval.passes import Numerics

F32 = np.float32
MARCH = Arithmetic(Numerics(8, False, generation="march"), n_heads=4)
UNKNOWN = Arithmetic(Numerics(), n_heads=4)
BF16 = Arithmetic(Numerics(compute_dtype="bf16"), n_heads=4)
ROWS, COLS = 60, 384
OP = Op("q", 0, BitLinear(4), ("blk.0.attn_norm",), ("w", "b"), ("n_tokens", "n_heads", "head_dim"))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, COLS)).astype(F32)


def matrix(factor: float = 1.0) -> TernaryMatrix:
    signs = np.random.default_rng(0).integers(-1, 2, (ROWS, COLS)).astype(F32)
    return TernaryMatrix(signs, float(F32(0.0371)) * factor, factor)


def bias(size: float) -> np.ndarray:
    return (np.random.default_rng(2).standard_normal(ROWS) * size).astype(F32)


def engine(x: np.ndarray, weight: TernaryMatrix, b: np.ndarray) -> np.ndarray:
    """What an engine in binary32 records: every step rounded."""
    s = (F32(127) / np.abs(x).max(axis=-1, keepdims=True)).astype(F32)
    sums = (np.rint(x * s) @ weight.signs.T).astype(F32)
    product = (sums / s).astype(F32) * F32(weight.scale / weight.factor)
    return (product * F32(weight.factor) + b).astype(F32)


def worst(x: np.ndarray, recorded: np.ndarray, weights: list, arithmetic: Arithmetic) -> float:
    found = bounds.check_bitlinear(x, recorded, weights, arithmetic)
    return float((np.abs(recorded - found.expected) / found.bound).max())


@pytest.mark.parametrize("arithmetic", [MARCH, UNKNOWN], ids=["march", "unknown"])
@pytest.mark.parametrize("size", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("factor", [1.0, 0.77])
def test_a_correct_engine_is_inside(x: np.ndarray, arithmetic: Arithmetic, size: float, factor: float) -> None:
    weight, b = matrix(float(F32(factor))), bias(size)
    assert worst(x, engine(x, weight, b), [weight, b.astype(np.float64)], arithmetic) <= 1


@pytest.mark.parametrize("arithmetic", [MARCH, UNKNOWN], ids=["march", "unknown"])
def test_one_code_and_one_value_of_the_bias_are_seen(x: np.ndarray, arithmetic: Arithmetic) -> None:
    """Beside a bias that is a hundred times a unit of the sums; its own rounding hides neither."""
    weight, b = matrix(), bias(0.3)
    recorded, weights = engine(x, weight, b), [weight, b.astype(np.float64)]
    off = recorded.copy()
    off[2, 7] += F32(weight.scale * np.abs(x[2]).max() / 127)
    assert worst(x, off, weights, arithmetic) > 1
    moved = weights[1].copy()
    moved[3] *= 1.01
    assert worst(x, recorded, [weight, moved], arithmetic) > 1
    assert worst(x, recorded, [weight, weights[1] * 0], arithmetic) > 1


def test_a_flip_at_a_tie_is_explained_behind_a_bias(x: np.ndarray) -> None:
    weight, b = matrix(), bias(0.3)
    x[0, 0], x[0, 1] = 127 / 32, 10.5 / 32  # the scale is 32 exactly, the second value a tie
    x[0, 2:] = np.clip(x[0, 2:], -3, 3)
    recorded = engine(x, weight, b)
    recorded[0] += (weight.signs[:, 1] * F32(weight.scale / 32)).astype(F32)  # 11 instead of 10
    found = bounds.check_bitlinear(x, recorded, [weight, b.astype(np.float64)], MARCH)
    assert found.flips == 1
    assert (np.abs(recorded - found.expected) <= found.bound).all()


def test_a_16_bit_engine_rounds_the_bias_and_the_sum(x: np.ndarray) -> None:
    weight, b = matrix(), bias(3.0)
    x = to_bf16(x).astype(F32)
    exact_product = engine(x, weight, b * 0).astype(np.float64)
    recorded = to_bf16(to_bf16(exact_product) + to_bf16(b)).astype(F32)
    weights = [weight, b.astype(np.float64)]
    assert worst(x, recorded, weights, BF16) <= 1
    assert worst(x, to_bf16(exact_product).astype(F32), weights, BF16) > 1


def test_inside_a_segment_the_bias_moves_the_value_and_not_its_error(x: np.ndarray) -> None:
    weight, b = matrix(), bias(2.0).astype(np.float64)
    rows = range(len(x))
    plain, _ = bounds.propagate_bitlinear(OP, exact(x), rows, [weight], MARCH, {})
    moved, _ = bounds.propagate_bitlinear(OP, exact(x), rows, [weight, b], MARCH, {})
    np.testing.assert_allclose(moved.value, plain.value + b.reshape(4, -1))
    assert moved.value.shape == (5, 4, ROWS // 4)
    # a factor that all values of a product share is none of the sums: it becomes an error of each
    shared = replace(exact(x), shared=np.full(5, 1e-3))
    off, _ = bounds.propagate_bitlinear(OP, shared, rows, [weight, b], MARCH, {})
    assert not off.shared.any()
    assert (off.total >= 1e-3 * np.abs(plain.value)).all()
