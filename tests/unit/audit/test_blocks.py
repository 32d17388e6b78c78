"""BitLinear over activations in blocks: against an emulation of the kernel, float by float, and against faults."""

from __future__ import annotations

import numpy as np
import pytest

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic, blocks
from crossval.audit.bounds.approx import Approx, exact
from crossval.model.kinds import BitLinear, TernaryMatrix
from crossval.model.op import Op
from crossval.passes import Numerics
from tests.support import q8_k

F32 = np.float32
BLOCKS = Numerics(8, False, generation="mainline", activation_quantization="q8_k", fused_sums=True)
STATED = Arithmetic(BLOCKS, n_heads=4)
OP = Op("ffn_down", 0, BitLinear(), ("blk.0.ffn_sub_norm",), ("w",), ("n_tokens", "dim"))


def matrix(rows: int, cols: int, seed: int = 0) -> TernaryMatrix:
    signs = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(F32)
    return TernaryMatrix(signs, float(F32(0.0371)))


def activations(n: int, cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, cols)) * rng.lognormal(0, 1, (n, cols // 64)).repeat(64, axis=1)).astype(F32)


def kernel(x: np.ndarray, weight: TernaryMatrix, *, fused: bool, lanes: int = 8) -> np.ndarray:
    return q8_k.multiply(x, weight.signs, weight.scale, fused=fused, lanes=lanes)


def check(x: np.ndarray, recorded: np.ndarray, weight: TernaryMatrix, arithmetic: Arithmetic = STATED) -> float:
    """Return the largest residual over its bound."""
    found = bounds.check_bitlinear(x, recorded, [weight], arithmetic)
    return float((np.abs(recorded - found.expected) / found.bound).max())


class TestHealthy:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("lanes", [8, 1])
    @pytest.mark.parametrize("cols", [256, 1792])
    def test_every_kernel_is_inside(self, fused: bool, lanes: int, cols: int) -> None:
        x, weight = activations(3, cols), matrix(40, cols)
        assert check(x, kernel(x, weight, fused=fused, lanes=lanes), weight) <= 1

    def test_codes_and_steps_are_those_of_the_source(self) -> None:
        x = activations(2, 512)
        x[0, :256] = 0.0
        x[1, 5] = -x[1, 9]  # the largest magnitude twice
        x[1, 5:7] *= 40
        found = blocks.quantize(x, STATED)
        for token in range(2):
            codes, steps = q8_k.quantize(x[token])
            np.testing.assert_array_equal(found.codes[token], codes)
            np.testing.assert_array_equal(found.steps[token, :, 0], steps)

    def test_a_fused_quantiser_rounds_once(self) -> None:
        """Products that only become ties by rounding them to binary32."""
        x = np.zeros((1, 256), F32)
        x[0, 0] = -1.3
        factor = F32(-127.0) / x[0, 0]
        ties = np.array([(k + 0.5) / np.float64(factor) for k in range(100)]).astype(F32)
        x[0, 1:101] = ties
        separate = blocks.quantize(x, STATED)
        once = blocks.quantize(x, Arithmetic(Numerics(8, True, activation_quantization="q8_k"), 4))
        exact_product = x.astype(np.float64) * np.float64(factor)
        np.testing.assert_array_equal(once.codes[0, 0], np.rint(exact_product[0]))
        assert (separate.codes != once.codes).any()

    def test_a_block_of_zeros_and_a_row_of_zeros(self) -> None:
        x, weight = activations(3, 512), matrix(20, 512)
        x[0, 256:] = 0
        x[2] = 0
        recorded = kernel(x, weight, fused=True)
        assert (recorded[2] == 0).all()
        assert check(x, recorded, weight) <= 1
        recorded[2, 3] = 1e-30
        assert check(x, recorded, weight) > 1

    def test_rows_that_are_not_whole_blocks_are_judged_by_row(self) -> None:
        x, weight = activations(2, 384), matrix(16, 384)
        found = bounds.check_bitlinear(x, np.zeros((2, 16), F32), [weight], STATED)
        assert (found.bound < 1e-5 * np.abs(found.expected).max()).all()
        assert not blocks.is_blocked(STATED, 384)


class TestFaults:
    """What a wrong engine computes is outside the bound: it has no room for a single code."""

    def wrong(self, change: str) -> float:
        x, weight = activations(3, 2560), matrix(40, 2560)
        recorded = kernel(x, weight, fused=True)
        if change == "one code":
            signs = weight.signs[:, 100]
            _, steps = q8_k.quantize(x[1])
            recorded[1] += (signs * steps[0] * F32(weight.scale)).astype(F32)
        elif change == "scale of the weights":
            recorded *= F32(1 + 2e-4)
        elif change == "quantised by row":
            scale = 127.0 / np.abs(x).max(axis=-1, keepdims=True)
            recorded = (np.rint(x * scale) / scale @ weight.signs.T * weight.scale).astype(F32)
        elif change == "not quantised":
            recorded = (x.astype(float) @ weight.signs.T * weight.scale).astype(F32)
        elif change == "two weights swapped":
            weight.signs[7, [3, 4]] = [1, -1]
            swapped = TernaryMatrix(weight.signs.copy(), weight.scale)
            swapped.signs[7, [3, 4]] = [-1, 1]
            recorded = kernel(x, swapped, fused=True)
        elif change == "127 instead of -127":
            recorded = -recorded
        elif change == "step of the block before":
            codes, steps = zip(*(q8_k.quantize(row) for row in x), strict=True)
            moved = np.stack(
                [
                    np.concatenate([q * d for q, d in zip(c, [s[-1], *s[:-1]], strict=True)])
                    for c, s in zip(codes, steps, strict=True)
                ]
            )
            recorded = (moved @ weight.signs.T * weight.scale).astype(F32)
        return check(x, recorded, weight)

    @pytest.mark.parametrize(
        "change",
        [
            "one code", "scale of the weights", "quantised by row", "not quantised", "two weights swapped",
            "127 instead of -127", "step of the block before",
        ],
    )  # fmt: skip
    def test_is_found(self, change: str) -> None:
        assert self.wrong(change) > 1
        assert self.wrong("nothing") <= 1

    def test_what_is_stated_decides(self) -> None:
        """An engine that states nothing is judged by row, as the model is defined."""
        x, weight = activations(3, 512), matrix(40, 512)
        recorded = kernel(x, weight, fused=True)
        assert check(x, recorded, weight, Arithmetic(Numerics(8, False), 4)) > 1
        scale = 127.0 / np.abs(x).max(axis=-1, keepdims=True)
        by_row = (np.rint(x * scale) @ weight.signs.T / scale * weight.scale).astype(F32)
        assert check(x, by_row, weight, Arithmetic(Numerics(), 4)) <= 1
        assert check(x, by_row, weight) > 1


class TestSegments:
    def propagate(self, x: Approx, weight: TernaryMatrix, flips: dict | None = None):
        return bounds.propagate_bitlinear(OP, x, range(len(x.value)), [weight], STATED, flips or {})

    def test_of_exact_inputs_it_is_the_product(self) -> None:
        x, weight = activations(3, 512), matrix(40, 512)
        found, _ = self.propagate(exact(x), weight)
        recorded = kernel(x, weight, fused=False)
        assert (np.abs(recorded - found.value) <= found.error).all()

    def test_an_input_that_is_off_stays_inside_or_is_a_tie(self) -> None:
        x, weight = activations(6, 512), matrix(40, 512)
        rng = np.random.default_rng(5)
        noise = 1e-4 * np.abs(x.astype(float))
        actual = (x + noise * rng.uniform(-1, 1, x.shape)).astype(F32)
        zero = np.zeros_like(noise)
        found, ties = self.propagate(Approx(x.astype(float), noise + 1e-7 * np.abs(x), zero, np.zeros(6)), weight)
        here, there = blocks.quantize(x, STATED), blocks.quantize(actual, STATED)
        flipped = set(zip(*np.nonzero((here.codes != there.codes).reshape(6, -1)), strict=True))
        assert flipped
        assert flipped <= set(zip(ties.rows.tolist(), ties.features.tolist(), strict=True))
        flips = {("blk.0.ffn_sub_norm", row): frozenset(f for r, f in flipped if r == row) for row in range(6)}
        moved, _ = self.propagate(
            Approx(x.astype(float), noise + 1e-7 * np.abs(x), zero, np.zeros(6)), weight, flips
        )
        recorded = kernel(actual, weight, fused=True)
        assert (np.abs(recorded - moved.value) <= moved.error).all()
        assert (np.abs(recorded - found.value) > found.error).any()
