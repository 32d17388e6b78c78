"""Rules of rounding: one per kind, none by default; SiLU as engines compute it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic
from crossval.audit.bounds.approx import Approx
from crossval.formats import BF16, F16, Format
from crossval.model.kinds import KINDS, BitLinear, Kind, RmsNorm, Silu
from crossval.model.op import Op
from crossval.passes import Numerics

UNKNOWN, KNOWN = Arithmetic(Numerics(), 1), Arithmetic(Numerics(simd_width=8, fused_quantizer=True), 1)
GATES = np.concatenate([np.linspace(-130, 130, 5001), np.geomspace(1e-40, 1, 300), -np.geomspace(1e-40, 1, 300)])
SILU = Op("ffn_act", 0, Silu(), ("blk.0.ffn_gate",), (), ("n_tokens", "hidden_dim"))


def test_every_kind_but_bitlinear_has_a_rule():
    assert bounds.RULES.keys() == KINDS - {BitLinear}


def test_a_kind_without_a_rule_is_refused():
    @dataclass(frozen=True)
    class Gelu(Kind):
        formula = staticmethod(np.tanh)

    op = replace(SILU, kind=Gelu())
    with pytest.raises(KeyError, match="Gelu"):
        bounds.bound(op, [GATES], np.tanh(GATES), (), UNKNOWN)
    with pytest.raises(KeyError, match="Gelu"):
        bounds.propagate(op, [], (), UNKNOWN)


def silus(gate: np.ndarray) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        return {"quotient": gate / (1 + np.exp(-gate)), "reciprocal": gate * (1 / (1 + np.exp(-gate)))}


@pytest.mark.parametrize("arithmetic", [UNKNOWN, KNOWN], ids=["unknown", "known"])
@pytest.mark.parametrize("form", ["quotient", "reciprocal"])
def test_silu_in_binary32_is_within_its_bound(form, arithmetic):
    gate = GATES.astype(np.float32)
    exact = SILU.function(gate.astype(np.float64))
    off = np.abs(silus(gate)[form] - exact)
    allowed = bounds.bound(SILU, [gate.astype(np.float64)], exact, (), arithmetic)
    assert (off <= allowed).all()
    seen = (np.abs(gate) > 1e-3) & (np.abs(gate) < 80)
    for wrong in (np.maximum(gate, 0) ** 2, SILU.function(gate * 1.00001)):
        assert (np.abs(wrong - exact) > allowed)[seen].mean() > 0.98


@pytest.mark.parametrize("form", [BF16, F16], ids=lambda form: form.name)
def test_silu_in_a_16_bit_format_is_within_its_bound(form: Format):
    rounded = form.round
    gate = rounded(GATES)
    with np.errstate(over="ignore", divide="ignore"):
        found = rounded(gate / rounded(1 + rounded(np.exp(-gate))))
        other = rounded(gate * rounded(1 / rounded(1 + rounded(np.exp(-gate)))))
    exact = SILU.function(gate)
    low = Arithmetic(Numerics(compute_dtype=form.name), 1)
    allowed = bounds.bound(SILU, [gate], exact, (), low)
    assert (np.abs(found - exact) <= allowed).all()
    assert (np.abs(other - exact) <= allowed).all()


def test_errors_travel_through_silu():
    rng = np.random.default_rng(1)
    gate = rng.normal(scale=4, size=(8, 500))
    noise, jump, shared = np.full(gate.shape, 1e-3), np.abs(gate) * 1e-3, np.full(8, 2e-3)
    found = bounds.propagate(SILU, [Approx(gate, noise, jump, shared)], (), UNKNOWN)
    for sign in (-1, 1):
        moved = gate + sign * (noise + jump + np.abs(gate) * shared[:, None])
        assert (np.abs(SILU.function(moved) - found.value) <= found.total * (1 + 1e-3)).all()


def test_a_norm_is_judged_with_its_own_eps():
    x = np.full((1, 4), 1e-3)
    for eps in (1e-5, 1.0):
        op = Op("attn_norm", 0, RmsNorm(eps), ("inp_embd",), ("w",), ("n_tokens", "dim"))
        expected = op.function(x, np.ones(4))
        shift = bounds.propagate(op, [Approx(x, 0 * x, 0 * x, np.array([0.1]))], [np.ones(4)], KNOWN).shared
        assert shift == pytest.approx(0.1 * eps / (1e-6 + eps), rel=1e-3)
        assert bounds.bound(op, [x], expected, [np.ones(4)], KNOWN).max() < 1e-6


def test_known_arithmetic_sums_in_short_chains():
    assert KNOWN.sum_steps(2560) < 330
    assert UNKNOWN.sum_steps(2560) == 2560


def test_the_bound_of_an_infinity_is_no_number_and_no_warning():
    value = np.array([[1.0, np.inf], [2.0, 4.0]])
    nothing = np.zeros_like(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = Approx(value, nothing, nothing, np.array([0.0, 0.5])).total
    assert not total[0, 1] <= 1.0  # nothing is within it
    np.testing.assert_array_equal(total[[0, 1, 1], [0, 0, 1]], [0.0, 1.0, 2.0])
