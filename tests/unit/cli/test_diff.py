"""``crossval diff``: two traces of one prompt."""

from __future__ import annotations

import pytest

from crossval.receipts import file as receipt
from tests.support.strangers import error_line, run


def test_two_traces(model_path, record, golden, out):
    result = run("diff", record(name="other"), golden, "--model", model_path, "--receipt", out)
    assert result.exit_code == 0, result.output
    assert receipt.read(out)["settings"]["n_decode"] == 2
    # Two parties by name, but one build of one library: not a comparison of two engines.
    assert run("gate", out, "--allow-compute", "recorded").exit_code == 1


def test_a_trace_compared_with_itself_is_no_evidence(model_path, golden, out):
    assert run("diff", golden, golden, "--model", model_path, "--receipt", out).exit_code == 0
    result = run("gate", out, "--allow-compute", "recorded")
    assert result.exit_code == 1
    assert "candidate and reference have the same library_digest" in " ".join(result.stdout.split())


@pytest.mark.parametrize(("place", "expected"), [("none", "not a directory"), (".", "no finished trace")])
def test_what_is_no_trace(model_path, golden, tmp_path, place, expected):
    result = run("diff", tmp_path / place, golden, "--model", model_path)
    assert result.exit_code == 4
    assert expected in error_line(result)


def test_different_prompts(model_path, record, golden):
    result = run("diff", record(prompt="Another one"), golden, "--model", model_path)
    assert result.exit_code == 4
    assert "different prompts" in error_line(result)
