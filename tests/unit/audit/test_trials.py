"""Coarse recordings: what projections inside segments multiply, where no projection is judged by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.audit import trials
from crossval.audit.audit import _Engine, audit
from crossval.audit.checks import AuditResult, OpCheck, first_guilty
from crossval.audit.products import complaints, demands, sentence
from crossval.capture import Capture
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics
from crossval.receipts.policy import Policy
from tests.support import healthy_strangers
from tests.support.narrow_engine import NarrowEngine, Style, plans
from tests.support.numpy_bitnet.engine import Mistake
from tests.support.numpy_bitnet.mistakes import MISTAKES, in_layers, silu
from tests.support.numpy_bitnet.recorded import only
from tests.support.recordings import BY_NAME
from tests.zoo.detect import Replay

PLANS = plans((19,), ())
FLOATS, SILU = MISTAKES["float activations"], Mistake("SiLU", ("ffn_act",), silu)
OUTLINE = "every `l_out`"


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(n_layers=4, dim=128, n_heads=2, n_kv_heads=1, hidden_dim=128)


def judged(
    model: Path,
    style: Style,
    *,
    recorded: str = OUTLINE,
    made: Mistake | None = None,
    numerics: Numerics | None = None,
) -> AuditResult:
    recording = only(NarrowEngine(model, style, made=made).record(PLANS), BY_NAME[recorded].keeps)
    if numerics is not None:
        recording.identity = replace(recording.identity, numerics=numerics)
    weights = SpecWeights(model)
    return audit([Capture(Replay(recording), weights.config, PLANS)], weights)[0]


@pytest.mark.parametrize(
    ("style", "recorded", "found"),
    [
        (Style("f32", activations="none"), OUTLINE, ("none", "packed", ("float_activations",))),
        (Style("f32", weights="bf16"), OUTLINE, ("int8", "bf16", ("weights_bf16",))),
    ],
    ids=str,
)
def test_a_deviation_inside_segments_is_found_and_nothing_is_called_wrong(model, style, recorded, found):
    result = judged(model, style, recorded=recorded)
    assert result.first_guilty is None
    assert result.verdict in ("clean", "within")
    assert result.products is not None
    assert (result.products.activations, result.products.weights, result.products.deviations) == found
    assert not result.products.declared
    assert list(complaints(result.products.to_json(), Numerics(), Numerics())) == []


@pytest.mark.parametrize(
    ("recorded", "made", "tap"),
    [
        (OUTLINE, in_layers(FLOATS, [1, 2]), "blk.1.l_out"),
        (OUTLINE, SILU, "blk.0.l_out"),
        ("all taps", in_layers(FLOATS, [1, 2]), "blk.1.q"),
        ("all taps", in_layers(FLOATS, [2]), "blk.2.q"),
    ],
    ids=["floats in two layers of four", "SiLU in every layer", "the same by operation", "floats in one layer"],
)
def test_a_mistake_stays_one(model, recorded, made, tap):
    result = judged(model, Style("f32"), recorded=recorded, made=made)
    assert result.products is None
    assert result.first_guilty is not None
    assert result.first_guilty.tap == tap


def test_projections_that_are_right_either_way_tell_nothing(tmp_path):
    """Half of this model's scales are nearly what they round to in binary16."""
    situation, bench = healthy_strangers.Situation.draw(225), healthy_strangers.Bench(tmp_path)
    found = healthy_strangers.judged(replace(situation, n_decode=1), bench)
    assert found.verdict == "deviates"
    products = found.found.audits["candidate"].products
    assert products.deviations == ("weights_f16",)
    assert products.n_explained == products.n_checked < 28


def test_a_mistake_beside_the_deviation_stands_out(model):
    result = judged(model, Style("f32", activations="none"), made=in_layers(SILU, [2]))
    assert result.products is not None
    assert result.products.activations == "none"
    assert result.first_guilty is not None
    assert result.first_guilty.tap == "blk.2.l_out"


def test_a_statement_binds(model):
    result = judged(model, Style("f32", activations="none"), numerics=Numerics(activation_quantization="int8"))
    assert result.products is None
    assert result.verdict == "guilty"


def test_a_choice_that_cannot_explain_enough_any_more_is_given_up(model, monkeypatch):
    n_judged = Counter()
    judge = _Engine.judge

    def counted(engine, output):
        n_judged[given_up] += 1
        return judge(engine, output)

    monkeypatch.setattr(_Engine, "judge", counted)
    results = {}
    for given_up in (True, False):
        if not given_up:
            monkeypatch.setattr(trials._Count, "take", lambda count, check: False)
        results[given_up] = judged(model, Style("f32"), made=SILU)
    assert results[True] == results[False]
    assert n_judged[True] < 0.6 * n_judged[False]


PROJECTIONS = ("q", "k", "v", "attn_o_out", "ffn_gate", "ffn_up", "ffn_down")


def result_of(wrong: set[int], unseen: frozenset[int] = frozenset()) -> AuditResult:
    """An audit of four layers' projections, each judged by itself: some layers wrong, some not judged."""
    checks = tuple(
        OpCheck(0, "prefill", f"blk.{layer}.{name}", "guilty" if layer in wrong else "ok", 1.0, 8, 0)
        for layer in set(range(4)) - unseen
        for name in PROJECTIONS
    )
    return AuditResult("x", checks, 28, 28, first_guilty(checks), "guilty" if wrong else "clean")


@pytest.mark.parametrize(
    ("wrong", "then", "telling"),
    [
        ({0, 1, 2}, result_of(set()), 21),  # the fourth layer is right either way
        ({0, 1, 2}, result_of({3}), 28),
        ({0, 1, 2, 3}, result_of({3}), 28),
        ({0, 1, 2}, result_of({2, 3}), None),
        ({0, 1, 2}, result_of({2}), None),  # enough of those that tell, in two layers of four
        ({2}, result_of(set()), None),  # one layer is no property of the engine, whatever explains it
        ({2, 3}, result_of(set()), None),
        ({0, 1, 2}, result_of(set(), frozenset({1, 2})), None),  # what is not judged then is not explained
    ],
)
def test_of_the_projections_that_tell_most_have_to_be_explained_in_most_layers(wrong, then, telling):
    before = result_of(wrong)
    given_up = []

    def again(choice, hopeless):
        given_up.append(any(hopeless(check) for check in then.checks))
        return then

    found = trials.search(before, Numerics(), again)
    assert (found and found.products.n_checked) == telling
    assert not any(given_up) or telling is None
    assert len(wrong) > 2 or not given_up, "an audit that cannot show anything"


def test_another_choice_that_explains_as_much_is_said_and_no_cause_is_named_alone():
    """Two deviations together say each of them, too: an explanation that has the one named is no other one."""
    before, tried = result_of({0, 1, 2, 3}), []

    def again(choice, hopeless):
        tried.append(choice)
        right = choice not in [("int8", "bf16")]
        return result_of(set()) if right else None

    found = trials.search(before, Numerics(), again)
    assert (found.products.deviations, found.products.alternatives) == (
        ("weights_f16",),
        (("float_activations",), ("float_activations", "weights_bf16")),
    )
    assert ("none", "f16") not in tried
    held = found.products.to_json()
    assert list(complaints(held, Numerics(), Numerics())) == []
    for wrong in (
        [["weights_bf16", "float_activations"]],
        [["weights_f16", "float_activations"]],
        [["weights_f16"]],
        [[]],
    ):
        assert list(complaints({**held, "alternatives": wrong}, Numerics(), Numerics()))
    assert "or its activations are not quantised to int8" in sentence(held)
    assert "which of them it is was not shown" in sentence(held)
    audit = {"products": held}
    for allowed, passed in (
        (("weights_f16",), False),
        (("weights_f16", "float_activations", "weights_bf16"), True),
    ):
        (check,) = demands("candidate", audit, Policy(allow_deviation=allowed))
        assert check.passed == passed
