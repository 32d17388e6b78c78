"""Embedding models against recorded bitnet.cpp: every recorded tap and the vector of the text, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import crossval
from bitnet_py.embedding import embed
from bitnet_py.model import Model
from crossval.engines.bitnet_py import BitnetPyRunner, arithmetic_of
from crossval.engines.model_file import check_model
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError
from crossval.model import taps
from tests.support.embedding_models import GOLDENS, MODELS, TEXTS, written
from tests.support.families import FAMILIES

TRACES = [name + ending for name in MODELS for ending in ("", "-flash")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("embedding"))


@pytest.mark.parametrize("kernel", FAMILIES)
@pytest.mark.parametrize("trace", TRACES)
def test_engine_equals_bitnet_cpp_bit_for_bit(folder: Path, trace: str, kernel: str) -> None:
    name = trace.removesuffix("-flash")
    golden = RecordedRunner(GOLDENS / trace)
    numerics, model = golden.identity.numerics, written(name, folder)
    assert golden.trace.info.model.sha256 == check_model(model).sha256
    with golden, BitnetPyRunner(model, n_threads=1, kernel=kernel, numerics=numerics) as engine:
        (plan,) = golden.plan or ()
        assert engine.tokenize(TEXTS[name]) == list(plan.token_ids)
        names = taps.all_taps(2)
        theirs, ours = (one.eval(plan.token_ids, names).taps for one in (golden, engine))
    inside = numerics.inside_others(name, True)
    known = set(taps.of_graph(name, True, True)) - inside
    if not trace.endswith("-flash"):
        assert {taps.parse(one).tap for one in theirs} == known
    assert {"pooled", "embedding", "result_norm", "blk.1.kqv_out"} <= set(theirs)
    for one, tap in theirs.items():
        assert ours[one].rows == tap.rows, one
        assert np.array_equal(ours[one].array.view(np.uint32), tap.array.view(np.uint32)), one
    with Model.from_gguf(model, n_threads=1, arithmetic=arithmetic_of(numerics)) as opened:
        vector = embed(opened, plan.token_ids)
    assert np.array_equal(vector, theirs["embedding"].array[0])
    assert abs(float(np.linalg.norm(vector.astype(np.float64))) - 1.0) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_layers_finds_parity_and_both_audits_clean(folder: Path, name: str) -> None:
    receipt = crossval.compare_engines(
        TEXTS[name], written(name, folder), reference=str(GOLDENS / name), full=True
    )
    assert receipt["verdict"] == "parity"
    assert receipt["first_inexact"] is None
    rows = {row["tap"]: row for row in receipt["results"]["rows"]}
    assert rows["embedding"]["n_elements"] == MODELS[name].dim
    assert {receipt["audit"][side]["verdict"] for side in ("candidate", "reference")} == {"clean"}
    assert receipt["model"]["pooling"] == MODELS[name].pooling
    assert receipt["model"]["input_norms"] is True


@pytest.mark.parametrize("name", MODELS)
def test_the_specification_alone_audits_clean(folder: Path, name: str) -> None:
    receipt = crossval.audit_trace(GOLDENS / name, written(name, folder))
    assert receipt["audit"]["candidate"]["verdict"] == receipt["audit"]["reference"]["verdict"] == "clean"


@pytest.mark.parametrize(
    "verb",
    [
        lambda path: crossval.greedy("hi", path, candidate="bitnet_py", reference="spec"),
        lambda path: crossval.metamorphic(path),
        lambda path: crossval.smoke_test(path),
    ],
)
def test_what_needs_tokens_is_refused_with_the_reason(folder: Path, verb) -> None:
    with pytest.raises(BadInputError, match="an embedding model"):
        verb(written("qwen3", folder))


def test_decoded_tokens_are_refused(folder: Path) -> None:
    with pytest.raises(BadInputError, match="4 decoded tokens of an embedding model"):
        crossval.compare_engines("hi", written("qwen3", folder), reference="spec", n_decode=4)


def test_a_prompt_of_several_passes_is_refused(folder: Path) -> None:
    with pytest.raises(BadInputError, match="is fed in 3 passes, and"):
        crossval.compare_engines("a house " * 300, written("qwen3", folder), reference="spec")
