"""What projections multiply: a deviation that is stated, one that is found, and what is a defect instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.audit import bounds, products
from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import AuditResult
from crossval.audit.products import Products, Votes
from crossval.capture import Capture
from crossval.formats import BF16
from crossval.model import taps
from crossval.model.kinds import TernaryMatrix
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics
from crossval.receipts.policy import Policy
from tests.support.narrow_engine import Mistake, NarrowEngine, Style, plans
from tests.support.numpy_bitnet.engine import Mistake as Made
from tests.support.numpy_bitnet.mistakes import MISTAKES, in_layers
from tests.zoo.detect import Replay

PLANS = plans((1019, 273, 271, 220), (17,))
FLOATS, ROUNDED = Style("f32", activations="none"), Style("f32", weights="bf16")


def judged(
    model: Path,
    style: Style,
    mistake: Mistake | None = None,
    *,
    made: Made | None = None,
    numerics: Numerics | None = None,
) -> AuditResult:
    """Audit an engine that was recorded once: sums of floats need not come out alike in every run."""
    recording = NarrowEngine(model, style, mistake, made=made).record(PLANS)
    if numerics is not None:
        recording.identity = replace(recording.identity, numerics=numerics)
    weights = SpecWeights(model)
    return audit([Capture(Replay(recording), weights.config, PLANS)], weights)[0]


def found_in(result: AuditResult) -> tuple[str, str, bool] | None:
    found = result.products
    return None if found is None else (found.activations, found.weights, found.declared)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    ("style", "named"),
    [
        (FLOATS, ("float_activations",)),
        (ROUNDED, ("weights_bf16",)),
        (Style("f32", weights="f16"), ("weights_f16",)),
        (Style("f32", activations="none", weights="bf16"), ("float_activations", "weights_bf16")),
        (Style("bf16", activations="none", weights="bf16"), ("float_activations",)),
    ],
    ids=str,
)
def test_an_engine_that_deviates_in_every_projection_is_clean_and_its_deviation_named(
    shipped_model, style, named, states
):
    result = judged(shipped_model, replace(style, states=states))
    assert result.verdict == "clean"
    assert result.products is not None
    assert (result.products.deviations, result.products.declared) == (named, states)
    assert result.products.n_explained == result.products.n_checked == 56


@pytest.mark.parametrize(
    "style", [Style("f32"), Style("f32", weights="f32"), Style("bf16", weights="bf16")], ids=str
)
def test_what_is_no_deviation_from_the_model_is_none(shipped_model, style):
    result = judged(shipped_model, style)
    assert result.verdict == "clean"
    assert products.deviations({"products": result.products and result.products.to_json()}) == []


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    ("style", "name", "tap"),
    [
        (FLOATS, "ffn_sub_norm skipped", "blk.2.ffn_sub_norm"),
        (FLOATS, "128 levels", "blk.2.q"),
        (ROUNDED, "truncation ffn_gate", "blk.2.ffn_gate"),
    ],
)
def test_a_mistake_in_one_layer_stands_out(shipped_model, style, name, tap, states):
    result = judged(shipped_model, replace(style, states=states), Mistake(name))
    assert result.first_guilty is not None
    assert result.first_guilty.tap == tap
    assert {c.tap for c in result.checks if c.wrong} <= {f"blk.2.{op}" for op in taps.LAYER_TAPS}
    assert found_in(result) == (style.activations, style.weights, states)


FLOAT = MISTAKES["float activations"]


@pytest.mark.parametrize(
    ("made", "tap"),
    [
        (replace(FLOAT, ops=("ffn_down",)), "blk.0.ffn_down"),
        (replace(FLOAT, ops=("q", "k", "v")), "blk.0.q"),
        (in_layers(FLOAT, [1, 2]), "blk.1.q"),
    ],
    ids=["one projection of every layer", "three of seven", "two layers of four"],
)
def test_a_deviation_of_some_projections_is_a_defect_of_these(shipped_model, made, tap):
    result = judged(shipped_model, Style("f32"), made=made)
    assert result.products is None
    assert result.first_guilty is not None
    assert result.first_guilty.tap == tap


@pytest.mark.parametrize(
    ("style", "numerics"),
    [
        (FLOATS, Numerics(activation_quantization="int8")),
        (FLOATS, Numerics(simd_width=8, fused_quantizer=False)),
        (Style("f32"), Numerics(activation_quantization="none")),
        (ROUNDED, Numerics(weights="packed")),
        (ROUNDED, Numerics(weights="f16")),
    ],
    ids=str,
)
def test_a_statement_binds(shipped_model, style, numerics):
    result = judged(shipped_model, style, numerics=numerics)
    assert result.first_guilty is not None
    assert result.first_guilty.tap == "blk.0.q"
    assert result.products is None or result.products.declared


# --- bounds ---------------------------------------------------------------------------------------------------


def product(style: Numerics, *, off: float = 0.0) -> float:
    """Return the worst ratio of a float product, one element of which is off by a fraction of its magnitudes."""
    rng = np.random.default_rng(1)
    signs = rng.integers(-1, 2, (24, 512)).astype(np.float32)
    matrix = TernaryMatrix(signs, 0.0371)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    used = products.of_statement(matrix, style)
    y = (x @ (signs * np.float32(used.scale)).T).astype(np.float32)
    y[1, 5] += off * np.abs(x[1]) @ np.abs(signs[5]) * used.scale
    found = bounds.check_bitlinear(x, y, [used], Arithmetic(style, 1))
    return float((np.abs(y - found.expected) / found.bound).max())


def test_a_float_product_is_held_to_the_roundings_of_its_sum():
    stated = Numerics(activation_quantization="none")
    assert product(stated) <= 1
    assert product(stated, off=600 * 2.0**-24) > 1
    assert product(replace(stated, accumulate="bf16"), off=600 * 2.0**-24) <= 1
    assert product(replace(stated, weights="bf16")) <= 1


def test_rounded_weights_are_exactly_those():
    matrix = TernaryMatrix(np.ones((1, 4), np.float32), 0.1234567)
    rounded = products.of_statement(matrix, Numerics(weights="bf16"))
    assert rounded.scale == float(BF16.round(np.array([0.1234567]))[0]) != matrix.scale
    assert products.of_statement(matrix, Numerics(weights="packed")) is matrix


# --- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_checked", "n_explained", "found"), [(12, 8, True), (12, 7, False), (6, 6, False)])
def test_two_thirds_of_the_projections_have_to_agree(n_checked, n_explained, found):
    votes = Votes(n_checked=n_checked, n_right=n_checked - n_explained)
    votes.explained["none", "packed"] = n_explained
    assert (votes.found(Numerics(), Numerics()) is not None) == found


def test_choices_that_explain_as_much_are_alternatives_unless_they_say_more():
    votes = Votes(n_checked=12)
    for choice, n in (
        (("int8", "bf16"), 8),
        (("none", "packed"), 12),
        (("none", "bf16"), 12),
        (("int8", "f16"), 7),
    ):
        votes.explained[choice] = n
    found = votes.found(Numerics(), Numerics())
    assert (found.deviations, found.alternatives) == (("weights_bf16",), (("float_activations",),))
    assert products.of_json(found.to_json()) == found


def test_what_deviates_least_is_tried_first():
    assert products.choices(Numerics(compute_dtype="f16"))[0] == ("int8", "f16")
    assert products.choices(Numerics())[0] == ("int8", "bf16")
    assert products.choices(Numerics())[-1] == ("none", "f16")


# --- receipts -------------------------------------------------------------------------------------------------

GOOD = Products("none", "packed", False, 12, 9, ("float_activations",)).to_json()
STATED = Numerics(activation_quantization="none")


@pytest.mark.parametrize(
    ("change", "stated"),
    [
        ({"declared": True}, Numerics()),
        ({}, STATED),
        ({}, Numerics(activation_quantization="int8")),
        ({"n_explained": 7}, Numerics()),
        ({"n_explained": 13}, Numerics()),
        ({"deviations": []}, Numerics()),
        ({"activations": "int8"}, Numerics()),
        (None, STATED),
    ],
)
def test_a_finding_that_does_not_follow_is_a_complaint(change: dict[str, Any] | None, stated: Numerics):
    assert not list(products.complaints(GOOD, Numerics(), Numerics()))
    assert not list(products.complaints({**GOOD, "declared": True}, STATED, STATED))
    changed = None if change is None else {**GOOD, **change}
    assert list(products.complaints(changed, stated, stated))


def test_the_gate_accepts_the_deviation_that_the_policy_names_and_no_other():
    audit = {"products": {**GOOD, "deviations": ["float_activations", "weights_bf16"]}}
    for allowed, passed in (
        ((), False),
        (("float_activations",), False),
        (("weights_bf16", "float_activations"), True),
    ):
        (check,) = products.demands("candidate", audit, Policy(allow_deviation=allowed))
        assert check.passed == passed
    assert list(products.demands("candidate", {}, Policy())) == []
