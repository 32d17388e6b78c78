"""Faults of embedding models: every one is found where it is, and none is called by another's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.model.weights import SpecWeights
from tests.support.extra import sampled
from tests.zoo.detect import audited, named
from tests.zoo.embedding_models import CASES, MODELS, Fault, run, write


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpecWeights]:
    folder = tmp_path_factory.mktemp("embedding")
    return {model: SpecWeights(write(model, Path(folder))) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_the_healthy_engine_is_clean(weights: dict[str, SpecWeights], model: str) -> None:
    _, recording = run(weights[model], None)
    result = audited(recording, weights[model])
    assert result.verdict == "clean"
    assert result.n_covered == result.n_ops == len(recording.passes[0].taps)


@pytest.mark.parametrize(
    ("fault", "model"),
    sampled(CASES, 3, lambda case: (case[0].name, case[1])),
    ids=[f"{fault.name}-{model}" for fault, model in CASES],
)
def test_a_fault_is_found_where_it_is_and_named_or_left_open(
    weights: dict[str, SpecWeights], fault: Fault, model: str
) -> None:
    tap, recording = run(weights[model], fault)
    result = audited(recording, weights[model])
    assert result.first_guilty is not None
    assert result.first_guilty.tap == tap
    found = named(recording, result, weights[model])
    assert found is not None
    assert found.name in fault.right | {UNDETERMINED}
    assert found.name != UNDETERMINED or fault.right & set(found.candidates), found
