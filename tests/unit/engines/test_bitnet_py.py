"""Our engine as a runner: it computes what the reference states, and states what it computes."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from bitnet_py import Arithmetic
from crossval.engines.bitnet_py import BitnetPyRunner, arithmetic_of, numerics_of
from crossval.model import taps
from crossval.passes import Numerics

MAIN = Numerics(16, False, generation="main", binary16_sums=True, flash_attention=True, attention_threads=3)


@pytest.mark.parametrize(
    ("numerics", "arithmetic"),
    [
        (Numerics(), Arithmetic()),
        (Numerics(16, True), Arithmetic(simd_width=16, fused_quantizer=True)),
        (Numerics(generation="main"), Arithmetic("main")),
        (Numerics(8, generation="main", fused_quantizer=True), Arithmetic("main")),
        (MAIN, Arithmetic("main", 16, half_sums=True, flash_attention=True, attention_threads=3)),
        (Numerics(16, generation="mainline"), Arithmetic("main", 16)),
    ],
)
def test_what_a_reference_states_is_computed(numerics, arithmetic):
    assert arithmetic_of(numerics) == arithmetic


def test_the_reference_is_followed_only_where_it_is_main():
    assert arithmetic_of(MAIN, follow_reference_graph=True).follow_reference
    assert arithmetic_of(Numerics(8), follow_reference_graph=True) == Arithmetic()


@pytest.mark.parametrize(
    "numerics",
    [Numerics(8, False), Numerics(16, True), MAIN,
     Numerics(8, False, generation="main", binary16_sums=False, flash_attention=False)],
)  # fmt: skip
def test_what_is_computed_is_stated(make_model, numerics):
    assert numerics_of(arithmetic_of(numerics)) == numerics
    with BitnetPyRunner(make_model(), n_threads=1, numerics=numerics, follow_reference_graph=True) as runner:
        assert runner.identity.numerics == numerics
        followed = runner.identity.settings.get("follow_reference_graph", False)
    assert followed == (numerics.generation == "main")
    with BitnetPyRunner(make_model(), n_threads=1, numerics=numerics) as runner:
        assert "follow_reference_graph" not in runner.identity.settings
        assert asdict(runner.model.arithmetic)["follow_reference"] is False


def test_flash_attention_gives_every_tap_but_the_scores(make_model):
    asked = taps.of_model(2)
    with BitnetPyRunner(make_model(), n_threads=1, numerics=MAIN) as runner:
        found = runner.eval([1, 2, 3], asked).taps
    assert set(asked) - set(found) == {f"blk.{i}.{tap}" for i in range(2) for tap in ("kq", "kq_soft_max")}


def test_following_the_reference_computes_silu(make_model):
    acts = {}
    for follows in (False, True):
        with BitnetPyRunner(
            make_model(), n_threads=1, numerics=Numerics(8, generation="main"), follow_reference_graph=follows
        ) as runner:
            found = runner.eval([1, 2, 3], ["blk.0.ffn_gate", "blk.0.ffn_act"]).taps
            acts[follows] = found["blk.0.ffn_act"].array
            gate = found["blk.0.ffn_gate"].array
    np.testing.assert_array_equal(acts[False], np.maximum(gate, 0) ** 2)
    np.testing.assert_allclose(acts[True], gate / (1 + np.exp(-gate.astype(np.float64))), rtol=1e-6)
