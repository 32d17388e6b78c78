"""``crossval record``: a trace that can be compared."""

from __future__ import annotations

from tests.support.strangers import PROMPT, error_line, run


def test_record_then_compare(model_path, tmp_path):
    out = tmp_path / "trace"
    common = ("--prompt", PROMPT, "--model", model_path)
    result = run("record", *common, "--out", out, "--engine", "spec", "--decode", "1")
    assert result.exit_code == 0, result.output
    assert "specification" in result.stdout
    result = run("layers", *common, "--candidate", out, "--reference", "spec")
    assert result.exit_code == 0, result.output
    again = run("record", *common, "--out", out, "--engine", "spec")
    assert again.exit_code == 4
    assert "not empty" in error_line(again)
    assert run("record", *common, "--out", out, "--engine", "spec", "--outline", "--overwrite").exit_code == 0
