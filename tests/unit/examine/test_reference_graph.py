"""bitnet.cpp's main computes something else than the model: said as such, or followed where that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crossval.audit import diagnosis_checks
from crossval.diagnose.findings import to_json
from crossval.examine.examination import Examination, examine
from crossval.model.reference_graph import differences, followed
from crossval.model.weights import SpecWeights
from crossval.receipts.party import Party
from crossval.receipts.policy import Policy
from crossval.registry import judge
from tests.support import receipt_samples as samples
from tests.support.numpy_bitnet.engine import Mistake
from tests.support.numpy_bitnet.main import Build
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner
from tests.unit.examine.test_triage import told

MakeModel = Callable[..., Path]
IDS = (1, 17, 42, 250, 3)
MODEL, SILU = Build(relu=True), Build()
GRAPH = "SiLU instead of squared ReLU and NaN for an all-zero activation row"


def without_norm(source: Path, tensor: str, target: Path) -> Path:
    """Copy a model file with a norm's weight zero."""
    shutil.copy(source, target)
    file = Model(target)._file
    shape, _, offset = file.infos[tensor]
    with target.open("r+b") as stream:
        stream.seek(file.data + offset)
        stream.write(bytes(4 * shape[0]))
    return target


def examined(path: Path, ours: Build, theirs: Build, **options: bool) -> Examination:
    model = Model(path)
    candidate, reference = (NumpyBitnetRunner(model, build=build) for build in (ours, theirs))
    return examine(candidate, reference, IDS, path, n_decode=1, full=True, **options)


# --- what it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "generation", "found"),
    [
        ("bitnet-b1.58", "main", GRAPH.split(" and ")),
        ("bitnet-25", "main", GRAPH.split(" and ")[1:]),
        ("bitnet-b1.58", "march", []),
        ("bitnet-b1.58", None, []),
    ],
)
def test_what_a_generation_computes_otherwise(architecture, generation, found):
    assert differences(architecture, generation) == found


def test_a_generation_that_computes_the_model_changes_nothing(make_model: MakeModel):
    weights = SpecWeights(make_model())
    assert followed(weights.config, "march") == weights.config
    assert weights.following("march") is weights
    assert weights.following(None) is weights
    other = weights.following("main")
    assert (other.config.activation, other.config.follows) == ("silu", "main")
    assert weights.config.activation == "relu_squared"


# --- SiLU -----------------------------------------------------------------------------------------------------


def test_silu_is_the_references_defect(make_model: MakeModel):
    found = examined(make_model(), MODEL, SILU)
    assert found.audits["candidate"].verdict == "clean"
    (finding,) = found.findings
    assert (finding.side, finding.check.tap) == ("reference", "blk.0.ffn_out")
    assert finding.diagnosis.name == "SiLU"
    assert finding.diagnosis.segment_ops == ("blk.0.ffn_act",)


def test_followed_both_are_held_to_silu(make_model: MakeModel):
    found = examined(make_model(), SILU, SILU, follow_reference_graph=True)
    assert [one.verdict for one in found.audits.values()] == ["clean", "clean"]
    assert all(row.bitwise_equal for row in found.result.rows)
    model = examined(make_model(), MODEL, SILU, follow_reference_graph=True)
    assert {one.side for one in model.findings} == {"candidate"}
    assert model.findings[0].check.tap == "blk.0.ffn_out"
    assert model.findings[0].diagnosis.explanation.startswith("squared ReLU instead of SiLU (ffn_act")


# --- all-zero rows --------------------------------------------------------------------------------------------


def test_an_all_zero_row_is_named_where_it_becomes_nan(make_model: MakeModel, tmp_path: Path):
    path = without_norm(make_model(), "blk.1.ffn_norm.weight", tmp_path / "zero.gguf")
    finding = examined(path, MODEL, MODEL).findings[1]
    assert (finding.side, finding.check.tap) == ("reference", "blk.1.ffn_gate")
    assert finding.diagnosis.name == "all-zero activation row"
    assert finding.further is None
    audit = examined(path, MODEL, MODEL).audits_json()["reference"]
    assert audit is not None
    assert audit["n_covered"] <= sum(row["n_ops"] for row in audit["rows"])  # invalid segments, too


def test_it_is_named_too_after_another_mistake(make_model: MakeModel, tmp_path: Path):
    path = without_norm(make_model(), "blk.1.attn_norm.weight", tmp_path / "zero.gguf")
    finding = examined(path, MODEL, SILU).findings[-1]
    assert finding.diagnosis.name == "SiLU"
    data = to_json(finding, "crossval ...")
    assert (data["further"]["tap"], data["further"]["name"]) == ("blk.1.q", "all-zero activation row")


def test_followed_its_nan_is_left_unjudged_and_everything_else_compared(make_model: MakeModel, tmp_path: Path):
    path = without_norm(make_model(), "blk.1.attn_norm.weight", tmp_path / "zero.gguf")
    found = examined(path, SILU, SILU, follow_reference_graph=True)
    assert found.findings == ()
    assert [one.verdict for one in found.audits.values()] == ["incomplete", "incomplete"]
    assert found.result.verdict == "incomplete"
    rows = {row.tap for row in found.result.rows}
    assert {"blk.0.l_out", "blk.1.attn_norm"} <= rows
    assert "blk.1.q" not in rows
    (why,) = (one.why for one in found.result.coverage.skipped if (one.pass_index, one.tap) == (0, "blk.1.q"))
    assert why == "both engines hold NaN at the same places of every token"


def test_followed_nan_that_no_zero_row_makes_is_wrong(make_model: MakeModel, tmp_path: Path):
    path = without_norm(make_model(), "blk.1.attn_norm.weight", tmp_path / "zero.gguf")
    spoilt = Mistake("NaN", ("ffn_norm",), lambda call: call.right(*call.inputs) + np.float32("nan"))
    candidate, reference = (NumpyBitnetRunner(Model(path), mistakes=m, build=SILU) for m in ([spoilt], []))
    found = examine(candidate, reference, IDS, path, n_decode=1, follow_reference_graph=True)
    assert [(one.side, one.check.tap) for one in found.findings] == [("candidate", "blk.0.ffn_norm")]
    assert found.result.verdict == "divergence"


@pytest.mark.parametrize("op", ["q", "kq"])
def test_followed_nan_of_ordinary_inputs_is_wrong_where_others_would_be_excused(make_model: MakeModel, op: str):
    """What a BitLinear makes of a row that is not zero, and scores of keys that are numbers."""
    spoilt = Mistake("NaN", (op,), lambda call: call.right(*call.inputs) + np.float32("nan"), frozenset({1}))
    path = make_model()
    candidate, reference = (NumpyBitnetRunner(Model(path), mistakes=m, build=SILU) for m in ([spoilt], []))
    found = examine(candidate, reference, IDS, path, n_decode=1, full=True, follow_reference_graph=True)
    assert [(one.side, one.check.tap) for one in found.findings] == [("candidate", f"blk.1.{op}")]


@pytest.mark.parametrize(
    ("tap", "name", "said"),
    [
        ("blk.1.ffn_out", "all-zero activation row", []),
        ("blk.1.ffn_up", "all-zero activation row", ["which the audit does not show to be invalid"]),
        ("blk.1.ffn_out", "undetermined", ["which the audit does not show to be invalid"]),
        ("blk.0.q", "all-zero activation row", ["which comes first"]),
    ],
)
def test_another_mistake_that_a_receipt_names_has_to_be_there(tap, name, said):
    made = samples.layers_receipt(None, samples.audits(samples.audit_result({(1, "blk.1.ffn_act"): 8.0}), None))
    rows = made["audit"]["candidate"]["rows"]
    for row in rows:
        row["n_invalid"] = int(row["tap"] in ("blk.1.ffn_out", "blk.0.q"))
    found = {"tap": tap, "pass_index": 1, "pass_kind": "decode", "name": name, "explanation": "it is"}
    made["diagnosis"][0]["further"] = found
    complaints = [one.rpartition(", too, ")[2] for one in diagnosis_checks.complaints(made)]
    assert complaints == said


# --- what is said ---------------------------------------------------------------------------------------------


def followed_receipt(**changes):
    reference = Party("live", samples.with_numerics(samples.THEIRS, SILU.numerics))
    settings = {"n_threads": 2, "n_decode": 2, "n_steps": None, "full": False, "follow_reference_graph": True}
    return samples.layers_receipt(reference=reference, settings=settings, **changes)


def test_parity_with_the_references_graph_is_not_called_parity_with_the_model():
    made = followed_receipt()
    assert made["verdict"] == "parity"
    said = told(made)
    assert said["wrong side"].endswith("agree with each other and with the graph that the reference computes")
    assert said["held to"] == f"the graph that the reference computes, not the model: it has {GRAPH}"


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [(Policy(), False), (Policy(allow_reference_graph=False), False), (Policy(allow_reference_graph=True), True)],
)
def test_the_gate_accepts_it_only_where_that_is_asked_for(policy, allowed):
    checks = {one.name: one for one in judge(followed_receipt(), policy)}
    assert checks["graph"].passed is allowed
    assert GRAPH in checks["graph"].detail
    assert "graph" not in {one.name for one in judge(samples.layers_receipt(), Policy())}
