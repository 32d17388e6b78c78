"""``crossval gate``: exit codes of several receipts, options and policy files."""

from __future__ import annotations

import json

import pytest

import crossval.cli.gate as gate_command
from crossval.receipts import file as receipt
from tests.support.strangers import PROMPT, error_line, run


@pytest.fixture(scope="session")
def good_receipt(model_path, record, tmp_path_factory):
    out = tmp_path_factory.mktemp("receipts") / "good.json"
    words = ("--prompt", PROMPT, "--model", model_path, "--reference", record(), "--receipt", out)
    assert run("layers", *words).exit_code == 0
    return out


def test_exit_codes_of_several_receipts(good_receipt, tmp_path):
    edited, garbage = tmp_path / "edited.json", tmp_path / "garbage.json"
    edited.write_text(good_receipt.read_text().replace('"notes": []', '"notes": ["x"]'))
    garbage.write_text("{}")
    assert run("gate", good_receipt).exit_code == 0
    assert run("gate", good_receipt, edited).exit_code == 1
    assert run("gate", edited, good_receipt).exit_code == 1
    assert run("gate", edited, garbage, good_receipt).exit_code == 4
    assert run("gate", tmp_path / "none.json").exit_code == 4
    assert "garbage.json" in error_line(run("gate", garbage))
    assert gate_command.exit_code([]) == 1  # no receipt is no pass


def test_as_json(good_receipt, tmp_path):
    garbage = tmp_path / "garbage.json"
    garbage.write_text("[")
    result = run("gate", good_receipt, garbage, "--json", "--require-live")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["passed"] is False
    first, second = report["receipts"]
    assert {"name": "live reference", "passed": False, "detail": "reference is recorded"} in first["checks"]
    assert (second["passed"], second["checks"]) == (False, [])
    assert "not valid JSON" in second["error"]


@pytest.mark.parametrize("name", ["min_exact_match", "min_token_match", "min_logit_match", "min_cosine"])
def test_zero_is_a_value_and_overrides_the_policy_file(name, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("crossval.cli.gate.judge", lambda made, policy: held.append(policy) or [])
    monkeypatch.setattr("crossval.receipts.file.read", lambda path: {})
    policy, option = tmp_path / "policy.json", "--" + name.replace("_", "-")
    policy.write_text(json.dumps({"schema_version": 1, name: 0.75}))
    for more, expected in (((), 0.75), ((option, "0"), 0.0), ((option, "0.5"), 0.5)):
        run("gate", "r.json", "--policy", policy, *more)
        assert getattr(held[-1], name) == expected
        assert held[-1].require_live is False


def test_options_override_the_policy_file(good_receipt, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"schema_version": 1, "require_live": True, "model_sha256": ["0" * 64]}))
    assert run("gate", good_receipt, "--policy", policy).exit_code == 1
    sha256 = receipt.read(good_receipt)["model"]["sha256"]
    policy.write_text(json.dumps({"schema_version": 1, "model_sha256": ["0" * 64]}))
    assert run("gate", good_receipt, "--policy", policy).exit_code == 1
    assert run("gate", good_receipt, "--policy", policy, "--model-sha256", sha256).exit_code == 0
    policy.write_text("{")
    assert run("gate", good_receipt, "--policy", policy).exit_code == 4
