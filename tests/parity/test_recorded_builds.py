"""The bugs of two real builds of bitnet.cpp for ARM, found from their recordings on the shipped model.

Each trace is cut to the input and output of layer 0's first projections. bitnet.cpp of July 2026 makes three
mistakes at once; that of March 2026 makes one (microsoft/BitNet#598, #600).
"""

from pathlib import Path

import pytest

from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.capture import Capture
from crossval.diagnose.findings import find
from crossval.diagnose.search import diagnose_passes
from crossval.diagnose.variants import of_records
from crossval.engines.recorded import RecordedRunner
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
THREE = (
    "codes read four in a row; code table -2, -1, 0 (activation sum subtracted twice); "
    "in passes of several tokens, tokens t mod 4 ≠ 0 never written"
)
BUILDS = {"bitnet-cpp-july-arm": THREE, "bitnet-cpp-march-arm": "block of 64"}


@pytest.fixture(scope="module")
def weights():
    return SpecWeights(ROOT / "models" / "bitnet-qa.gguf")


@pytest.mark.parametrize("build", BUILDS)
def test_first_finding_is_named_with_all_its_mistakes(weights, build):
    with RecordedRunner(DATA / build) as runner:
        source = Capture(runner, weights.config, runner.plan)
        (result,) = audit([source], weights)
        found = find("candidate", source, result, weights)
    assert found is not None
    assert found.check.tap == "blk.0.q"
    assert found.diagnosis.name == BUILDS[build]
    assert len(found.diagnosis.candidates) == 1
    assert found.diagnosis.ratio <= 1e-7


@pytest.mark.parametrize("tap", ["q", "k", "v"])
@pytest.mark.parametrize("build", BUILDS)
def test_every_projection_gets_the_same_name(weights, build, tap):
    op = next(op for op in op_table(weights.config) if op.output == f"blk.0.{tap}")
    with RecordedRunner(DATA / build) as runner:
        names = [op.inputs[0], op.output]
        records = [runner.eval(plan.token_ids, names) for plan in runner.plan]
    contexts = [of_records(op, records, weights.config, weights, index=i) for i in range(len(records))]
    found = diagnose_passes(contexts, Arithmetic(runner.identity.numerics, weights.config.n_heads))
    assert found.name == BUILDS[build]


def test_without_the_decoded_tokens_the_prompt_alone_says_it(weights):
    op = next(op for op in op_table(weights.config) if op.output == "blk.0.q")
    with RecordedRunner(DATA / "bitnet-cpp-july-arm") as runner:
        record = runner.eval(runner.plan[0].token_ids, [op.inputs[0], op.output])
    found = diagnose_passes([of_records(op, [record], weights.config, weights)])
    assert found.name == THREE
    assert "what was in memory" in found.explanation
