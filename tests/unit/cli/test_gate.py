"""``crossval gate``: exit codes of several receipts, options and policy files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import crossval.cli.gate as gate_command
from crossval.receipts import file as receipt
from tests.support import receipt_samples as samples
from tests.support.strangers import PROMPT, error_line, run
from tests.support.weights_samples import weights_receipt


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
    assert {
        "name": "live reference",
        "passed": False,
        "detail": "reference is recorded",
        "applies": True,
    } in first["checks"]
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


def test_a_receipt_that_cannot_be_judged_does_not_hide_the_others(good_receipt, tmp_path, monkeypatch):
    """Even a defect of the gate is the error of one receipt."""
    other, real = tmp_path / "other.json", gate_command.judge
    other.write_bytes(good_receipt.read_bytes())

    def judge(made, policy):
        if made["notes"] == ["x"]:
            raise OverflowError("too large")
        return real(made, policy)

    monkeypatch.setattr(gate_command, "judge", judge)
    edited = tmp_path / "edited.json"
    edited.write_text(good_receipt.read_text().replace('"notes": []', '"notes": ["x"]'))
    result = run("gate", good_receipt, edited, other)
    assert result.exit_code == 5
    assert result.stdout.count("PASS  /") == 2
    assert result.stdout.splitlines()[-1] == "FAIL  3 receipts: 2 pass, 1 could not be judged"
    assert f"error: {edited}: OverflowError: too large" in error_line(result)
    assert [one["passed"] for one in json.loads(run("gate", edited, other, "--json").stdout)["receipts"]] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("field", "old", "new", "complaint"),
    [
        ("norm_ratio", "1.0", "1e200", "results.rows.0.norm_ratio: 1e+200 is greater than the maximum of 1e"),
        ("pass_index", "0", "0.0", "results.rows.0.pass_index: 0.0 is not of type 'integer'"),
        ("max_abs", "0.0", "1" + "0" * 4299, "number out of range"),
        ("max_abs", "0.0", "1e400", "number out of range"),
        ("n_elements", None, str(2**53), "results.rows.0.n_elements: 9007199254740992 is greater"),
    ],
)
def test_numbers_out_of_range_are_bad_input_of_one_receipt(field, old, new, complaint, good_receipt, tmp_path):
    made = receipt.read(good_receipt)
    row = made["results"]["rows"][0]
    assert old is None or json.dumps(row[field]) == old
    row[field] = "HERE"
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(made).replace('"HERE"', new))
    result = run("gate", odd, good_receipt)
    assert result.exit_code == 4
    assert complaint in error_line(result)
    assert result.stdout.splitlines()[-1] == "FAIL  2 receipts: 1 pass, 1 could not be judged"


@pytest.mark.parametrize("name", ["max_age_days", "min_decode_ratio", "min_tokens", "accept_within"])
@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400, "1" + "0" * 4299, "1e101"])
def test_numbers_out_of_range_in_a_policy_are_bad_input(name, number, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(f'{{"schema_version": 1, "{name}": {number}}}')
    result = run("gate", tmp_path / "none.json", "--policy", policy)
    assert result.exit_code == 4
    assert "policy.json: " in error_line(result)


def test_the_gate_ends_with_one_line_over_all_receipts(good_receipt, tmp_path):
    lines = run("gate", good_receipt, good_receipt).stdout.splitlines()
    assert lines[-1] == "PASS  2 receipts: 2 pass"
    assert run("gate", good_receipt).stdout.splitlines()[-1] == f"PASS  {good_receipt}"
    edited = tmp_path / "edited.json"
    edited.write_text(good_receipt.read_text().replace('"notes": []', '"notes": ["x"]'))
    lines = run("gate", edited, good_receipt).stdout.splitlines()
    assert lines[-1] == "FAIL  2 receipts: 1 pass, 1 fail"


@pytest.fixture
def receipts(tmp_path):
    """Return the paths of receipts by kind, each of which passes alone."""
    paths = {}
    for name in ("layers", "greedy", "selftest", "metamorphic", "smoke", "bench", "tokens"):
        paths[name] = tmp_path / f"{name}.json"
        receipt.write(paths[name], getattr(samples, f"{name}_receipt")())
    paths["weights"] = tmp_path / "weights.json"
    receipt.write(paths["weights"], weights_receipt())
    return paths


MEANT = {
    ("--require-live",): {"layers", "greedy", "smoke", "bench", "tokens", "metamorphic"},
    ("--min-exact-match", "0.01"): {"layers", "greedy", "smoke", "bench", "tokens", "weights"},
    ("--min-token-match", "0.01"): {"greedy"},
    ("--min-logit-match", "0.01"): {"layers", "greedy"},
    ("--min-cosine", "-1"): {"layers", "greedy"},
    ("--require-bitwise",): {"layers", "greedy", "bench"},
    ("--min-decode-ratio", "1e-9"): {"bench"},
}


@pytest.mark.parametrize("demand", MEANT, ids="".join)
def test_a_demand_holds_the_kinds_that_it_means(demand, receipts):
    meant = MEANT[demand]
    report = json.loads(run("gate", *receipts.values(), *demand, "--json").stdout)
    held = {
        kind
        for kind, one in zip(receipts, report["receipts"], strict=True)
        if any(check["applies"] for check in one["checks"] if check["name"] in NAMES[demand[0]])
    }
    assert held == meant
    others = [kind for kind in receipts if kind not in meant]
    for kind, one in zip(receipts, report["receipts"], strict=True):
        assert kind in meant or one["passed"], one
    # A demand that means none of the receipts holds nothing: that is no pass.
    alone = run("gate", *(receipts[kind] for kind in others), *demand)
    assert alone.exit_code == 1
    assert alone.stdout.splitlines()[-1] == f"FAIL  {len(others)} receipts: {len(others)} fail"
    shown = run("gate", receipts[others[0]], *(receipts[kind] for kind in meant), *demand).stdout
    assert " -  " in shown


NAMES = {
    "--require-live": ["live reference"],
    "--min-exact-match": ["exact match"],
    "--min-token-match": ["token match"],
    "--min-logit-match": ["logit match"],
    "--min-cosine": ["cosine"],
    "--require-bitwise": ["bitwise"],
    "--min-decode-ratio": ["decode ratio"],
}


def test_the_examples_of_the_help_pass_on_the_committed_receipts():
    """``gate receipts/*.json`` and greedy receipts with two demands."""
    folder = Path(__file__).parents[3] / "receipts"
    greedy = sorted(folder.glob("greedy-*.json"))
    assert greedy
    result = run("gate", *greedy, "--require-live", "--min-exact-match", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"PASS  {len(greedy)} receipts: {len(greedy)} pass"
    selftest = folder / "selftest.json"
    result = run("gate", *greedy[:1], selftest, "--require-live", "--min-exact-match", "1")
    assert result.exit_code == 0, result.output
    assert run("gate", selftest, "--require-live").exit_code == 1
