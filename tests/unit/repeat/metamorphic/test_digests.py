"""A digest per token sees every bit that counts, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from crossval.compare.rows import Skip
from crossval.passes import PassPlan, TapArray
from crossval.repeat.metamorphic.digests import TapDifference, compare_digests, digest_tap, join, until

RNG = np.random.default_rng(3)
FOUR = PassPlan("prefill", (1, 2, 3, 4), 0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def scores(*shape: int) -> np.ndarray:
    """Return scores of which the masked ones are zero."""
    return np.where(np.tri(shape[1], shape[2], shape[2] - shape[1], dtype=bool), values(*shape), np.float32(0))


def compared(name: str, one: np.ndarray, other: np.ndarray, plan: PassPlan = FOUR) -> TapDifference:
    found = compare_digests(name, *(digest_tap(name, TapArray(array), plan) for array in (one, other)))
    assert isinstance(found, TapDifference)
    return found


@pytest.mark.parametrize(("name", "shape"), [("blk.3.ffn_up", (4, 6)), ("blk.0.q_rope", (4, 2, 3))])
def test_every_bit_of_every_value_counts(name, shape):
    array = values(*shape)
    assert compared(name, array, array.copy()) == TapDifference(name, array.size)
    for index in range(array.size):
        for bit in (0, 22, 31):
            other = array.copy()
            other.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
            assert compared(name, array, other).different == (index * 4 // array.size,)


def test_signed_zeros_are_different_bits():
    zeros = np.zeros((4, 3), np.float32)
    assert compared("inp_embd", zeros, -zeros).different == (0, 1, 2, 3)


def test_what_lies_behind_the_mask_counts_in_the_softmax_only():
    array = scores(2, 4, 4)
    other = array.copy()
    other[1, 2, 3] = 5
    found = compared("blk.0.kq", array, other)
    assert (found.different, found.n_elements) == ((), 2 * (1 + 2 + 3 + 4))
    assert compared("blk.0.kq_soft_max", array, other).different == (2,)
    other[1, 2, 1] = 5
    assert compared("blk.0.kq", array, other).different == (2,)


@pytest.mark.parametrize("tap", ["kq", "kq_soft_max"])
def test_scores_over_more_keys_have_the_same_digest(tap):
    long = scores(2, 4, 4)
    passes = [
        digest_tap(f"blk.1.{tap}", TapArray(long[:, t : t + 1, : t + 1].copy()), PassPlan("decode", (9,), t))
        for t in range(4)
    ]
    one, other = digest_tap(f"blk.1.{tap}", TapArray(long), FOUR), join(f"blk.1.{tap}", passes)
    found = compare_digests(f"blk.1.{tap}", one, other)
    assert found == TapDifference(f"blk.1.{tap}", 20 if tap == "kq" else 32)
    beginning = compare_digests(f"blk.1.{tap}", until(other, 2), until(other, 2))
    assert beginning == TapDifference(f"blk.1.{tap}", 6 if tap == "kq" else 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_even_when_their_bits_are_equal(value):
    array = values(4, 3)
    array[2, 1] = value
    found = compared("blk.0.v", array[..., None], array[..., None].copy())
    assert (found.invalid, found.not_finite, found.different) == (True, (2,), ())


def test_only_tokens_that_both_give_are_compared():
    array = values(4, 5)
    some = digest_tap("blk.1.l_out", TapArray(array[1:3].copy(), (1, 2)), FOUR)
    whole = digest_tap("blk.1.l_out", TapArray(array), FOUR)
    last = digest_tap("blk.1.l_out", TapArray(array[3:].copy(), (3,)), FOUR)
    assert compare_digests("blk.1.l_out", some, whole) == TapDifference("blk.1.l_out", 10)
    assert isinstance(compare_digests("blk.1.l_out", some, last), Skip)


def test_rows_of_another_shape_are_invalid():
    found = compared("blk.1.l_out", values(4, 5), values(4, 6))
    assert (found.invalid, found.n_elements) == (True, 0)
    one = digest_tap("blk.1.l_out", TapArray(values(4, 5)), FOUR)
    other = digest_tap("blk.1.l_out", TapArray(values(1, 6)), PassPlan("decode", (1,), 4))
    with pytest.raises(ValueError, match="do not fit each other"):
        join("blk.1.l_out", [one, other])


@pytest.mark.parametrize(
    ("name", "array", "rows"),
    [
        ("blk.1.l_out", np.zeros((4, 5), np.float64), None),
        ("blk.1.l_out", np.zeros((3, 5), np.float32), None),
        ("blk.1.l_out", np.zeros((4, 0), np.float32), None),
        ("blk.1.l_out", np.zeros((2, 5), np.float32), (2, 1)),
        ("blk.1.kq", np.zeros((2, 4), np.float32), None),
        ("blk.1.kq", np.zeros((2, 4, 3), np.float32), None),
        ("blk.1.kq_soft_max", np.zeros((2, 3, 4), np.float32), None),
    ],
)
def test_an_array_that_does_not_fit_its_pass_is_refused(name, array, rows):
    with pytest.raises(ValueError, match=r"fit|rows must be"):
        digest_tap(name, TapArray(array, rows), FOUR)
