"""Activations in blocks: what a reference states, what the engine computes, and what it states in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_py import Arithmetic
from bitnet_py.errors import BitnetError, InputError
from crossval.compare.rows import choose_policy
from crossval.engines.bitnet_py import BitnetPyRunner, arithmetic_of, numerics_of
from crossval.passes import EngineIdentity, Numerics
from tests.support import q8_k
from tests.support.families import each_family

MAINLINE = Numerics(
    8,
    False,
    generation="mainline",
    binary16_sums=False,
    flash_attention=False,
    activation_quantization="q8_k",
    fused_sums=True,
)
SHAPE = {"dim": 256, "hidden_dim": 512, "arch": "bitnet", "projections": "tq2_0"}


@pytest.mark.parametrize(
    "stated",
    [
        MAINLINE,
        replace(MAINLINE, fused_sums=False, fused_quantizer=True, simd_width=16),
        replace(MAINLINE, generation="main", flash_attention=True, attention_threads=2),
        Numerics(8, True, generation="march", activation_quantization="q8_k", fused_sums=True),
    ],
)
def test_the_engine_states_what_it_was_asked_for(stated: Numerics) -> None:
    assert numerics_of(arithmetic_of(stated), stated) == stated


def test_what_belongs_to_blocks_needs_them() -> None:
    with pytest.raises(InputError, match="fused_sums"):
        Arithmetic(fused_sums=True)
    with pytest.raises(InputError, match="block_quantizer"):
        Arithmetic(generation="main", fused_quantizer=True)
    Arithmetic(generation="main", fused_quantizer=True, block_quantizer=True)


@each_family
def test_a_projection_is_that_of_the_sources(make_model: Callable[..., Path], kernel: str) -> None:
    model = make_model(**SHAPE)
    with BitnetPyRunner(model, numerics=MAINLINE, kernel=kernel) as engine:
        found = engine.eval(
            [3, 1, 4, 1, 5], ["blk.0.attn_norm", "blk.0.q", "blk.1.ffn_sub_norm", "blk.1.ffn_down"]
        )
        for tap, x, weight in (
            ("blk.0.q", "blk.0.attn_norm", engine.model.weights.layers[0].q),
            ("blk.1.ffn_down", "blk.1.ffn_sub_norm", engine.model.weights.layers[1].down),
        ):
            codes = np.stack([weight.data >> shift & 3 for shift in (6, 4, 2, 0)])
            signs = codes.reshape(4, -1, 32).transpose(1, 0, 2).reshape(weight.rows, weight.cols).astype(int) - 1
            inputs, output = found.taps[x].array, found.taps[tap].array
            expected = q8_k.multiply(inputs, signs, weight.scale, fused=True)
            np.testing.assert_array_equal(output.reshape(expected.shape).view("u4"), expected.view("u4"))


def test_without_being_asked_it_quantises_by_row(make_model: Callable[..., Path]) -> None:
    """As the model is defined, so that a file of another type is still the same model."""
    with (
        BitnetPyRunner(make_model(**SHAPE)) as engine,
        BitnetPyRunner(
            make_model(**SHAPE), numerics=replace(MAINLINE, activation_quantization=None, fused_sums=None)
        ) as other,
    ):
        assert engine.identity.numerics.quantizer_block is None
        assert other.identity.numerics.quantizer_block is None
        logits = [one.eval([3, 1, 4], ["result_output"]).taps["result_output"].array for one in (engine, other)]
    with BitnetPyRunner(make_model(**SHAPE), numerics=MAINLINE) as blocks:
        beside = blocks.eval([3, 1, 4], ["result_output"]).taps["result_output"].array
    assert 0 < np.linalg.norm(beside - logits[1]) / np.linalg.norm(beside) < 0.2


def test_rows_that_are_not_whole_blocks_are_refused(make_model: Callable[..., Path]) -> None:
    with pytest.raises(BitnetError, match="rows of a multiple of 256"):
        BitnetPyRunner(make_model(), numerics=MAINLINE).__enter__()


def test_one_engine_in_blocks_and_one_by_row_have_a_tolerance_of_their_own() -> None:
    def identity(numerics: Numerics) -> EngineIdentity:
        return EngineIdentity("x", numerics=numerics)

    by_row = replace(MAINLINE, activation_quantization=None, fused_sums=None)
    assert choose_policy(identity(MAINLINE), identity(MAINLINE)) == "same"
    assert choose_policy(identity(MAINLINE), identity(replace(MAINLINE, fused_sums=False))) == "independent"
    assert choose_policy(identity(MAINLINE), identity(by_row)) == "blocks"
    assert choose_policy(identity(Numerics()), identity(MAINLINE)) == "blocks"
    assert choose_policy(identity(Numerics(compute_dtype="bf16")), identity(MAINLINE)) == "bf16"
