"""Recipes of 16-bit engines: how the scale is computed and rounded, and what is dequantised first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crossval.audit.bounds import Arithmetic, integers
from crossval.audit.bounds.integers import half_away
from crossval.formats import BF16, to_f32
from crossval.model.kinds import TernaryMatrix
from crossval.passes import Numerics

WIDTH, ROWS, SCALE = 256, 64, 0.0625
BFLOAT16 = Arithmetic(Numerics(compute_dtype="bf16"), 1)


def product(
    x: np.ndarray, signs: np.ndarray, rounding: Callable[[np.ndarray], np.ndarray] = np.rint
) -> np.ndarray:
    """Return what transformers' BitLinear gives in bfloat16, every step rounded to the format."""
    scale = BF16.round(BF16.round(1 / np.abs(x).max(axis=-1, keepdims=True)) * 127)
    scaled = BF16.round(x * scale)
    codes = np.clip(rounding(scaled), -128, 127)
    made: np.ndarray = BF16.round(
        BF16.round(codes @ signs.T) / BF16.round(scale * BF16.round(np.asarray(1 / SCALE)))
    )
    return made.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_a_recipe_of_the_format_and_another_rounding_is_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = BF16.round(rng.normal(size=(16, WIDTH)))
    signs = rng.integers(-1, 2, (ROWS, WIDTH)).astype(np.float64)
    weight = TernaryMatrix(signs.astype(np.float32), SCALE)

    def fits(recorded: np.ndarray) -> bool:
        found: Any = integers.check(x.astype(np.float32), recorded, weight, BFLOAT16, np.zeros(1))
        return bool((np.abs(recorded - found.expected) <= found.bound).all())

    assert fits(product(x, signs))
    assert fits(product(x, signs, half_away))
    assert (product(x, signs, half_away) != product(x, signs)).any()
    assert not fits(product(x, signs, np.trunc))


def test_dequantised_activations_are_followed_by_three_roundings() -> None:
    """Class ``autobitlinear`` in bfloat16: of the sum, of the weight's scale and of their product."""
    rng = np.random.default_rng(0)
    signs, factor = rng.integers(-1, 2, (ROWS, WIDTH)).astype(np.float64), 0.0625 * (1 + 0.99 * BF16.unit_roundoff)
    x = BF16.round(rng.normal(size=(64, WIDTH)))
    scale = to_f32(127 / np.abs(x).max(axis=-1, keepdims=True))
    sums = BF16.round(np.rint(x * scale) / scale) @ signs.T
    recorded = BF16.round(BF16.round(sums) * BF16.round(np.asarray(factor)))
    found = integers.check(
        x.astype(np.float32), recorded, TernaryMatrix(signs.astype(np.float32), factor),
        BFLOAT16, np.zeros(1),
    )  # fmt: skip
    assert (np.abs(recorded - found.expected) <= found.bound).all()
    assert (np.abs(recorded - found.expected) > 2.1 * BF16.unit_roundoff * np.abs(found.expected)).any()


def absmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x).max(axis=-1, keepdims=True))


SCALINGS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "rounded scale": lambda x: (scale := BF16.round(127 / absmax(x)), x * scale),
    "rounded scale and product": lambda x: (scale := BF16.round(127 / absmax(x)), BF16.round(x * scale)),
    "reciprocal times 127": lambda x: (scale := BF16.round(BF16.round(1 / absmax(x)) * 127), x * scale),
    "the same, rounded product": lambda x: (
        scale := BF16.round(BF16.round(1 / absmax(x)) * 127),
        BF16.round(x * scale),
    ),
    "divided by a rounded step": lambda x: (1 / (step := BF16.round(absmax(x) / 127)), x / step),
    "the same, rounded quotient": lambda x: (1 / (step := BF16.round(absmax(x) / 127)), BF16.round(x / step)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_each_scaling_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, every = np.random.default_rng(1), integers._scalings
    x, signs = BF16.round(rng.normal(size=(16, WIDTH))), rng.integers(-1, 2, (ROWS, WIDTH)).astype(np.float64)
    scale, scaled = SCALINGS[name](x)
    recorded = BF16.round(np.clip(np.rint(scaled), -128, 127) @ signs.T / scale * SCALE)

    def fits() -> bool:
        weight = TernaryMatrix(signs.astype(np.float32), SCALE)
        found = integers.check(x.astype(np.float32), recorded, weight, BFLOAT16, np.zeros(1))
        return bool((np.abs(recorded - found.expected) <= found.bound).all())

    assert fits()
    others = [one for one in every(x, BF16) if not np.array_equal(one[1], scaled)]
    assert len(others) == 7
    monkeypatch.setattr(integers, "_scalings", lambda x, form: others)
    assert not fits()
