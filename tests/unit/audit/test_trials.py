"""Coarse recordings: what projections inside segments multiply, where no projection is judged by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.audit import trials
from crossval.audit.audit import _Engine, audit
from crossval.audit.checks import AuditResult
from crossval.audit.products import complaints
from crossval.capture import Capture
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics
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
    ("made", "layer"),
    [(in_layers(FLOATS, [1, 2]), 1), (SILU, 0)],
    ids=["floats in two layers of four", "SiLU in every layer"],
)
def test_a_mistake_stays_one(model, made, layer):
    result = judged(model, Style("f32"), made=made)
    assert result.products is None
    assert result.first_guilty is not None
    assert result.first_guilty.tap == f"blk.{layer}.l_out"


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
            monkeypatch.setattr(trials, "_hopeless", lambda held: lambda check: False)
        results[given_up] = judged(model, Style("f32"), made=SILU)
    assert results[True] == results[False]
    assert n_judged[True] < 0.6 * n_judged[False]
