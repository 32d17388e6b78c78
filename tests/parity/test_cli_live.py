"""The commands with real bitnet.cpp, end to end: parity, receipts, the gate."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from crossval.cli import cli
from crossval.receipts import file as receipt

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("use_bitnet_cpp")]


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_layers_and_greedy_pass_the_strictest_gate(shipped_model, tmp_path):
    layers, greedy = tmp_path / "layers.json", tmp_path / "greedy.json"
    common = ("--prompt", "What is 2+2?", "--model", shipped_model, "--reference", "bitnet.cpp")
    code, output = run("layers", *common, "--receipt", layers, "--full")
    assert code == 0, output
    assert "all bits equal" in output
    code, output = run("greedy", *common, "--receipt", greedy, "--steps", "32")
    assert code == 0, output
    assert "32/32" in output
    demands = ("--require-live", "--require-bitwise", "--min-exact-match", "1", "--max-age-days", "1")
    code, output = run("gate", layers, greedy, *demands)
    assert code == 0, output
    assert receipt.read(layers)["tokenizer"]["engines_agree"] is True


def test_a_recorded_bitnet_cpp_is_a_reference_too(shipped_model, tmp_path):
    trace, out = tmp_path / "trace", tmp_path / "r.json"
    common = ("--prompt", "Hello", "--model", shipped_model)
    code, output = run("record", *common, "--out", trace)
    assert code == 0, output
    code, output = run("layers", *common, "--reference", trace, "--receipt", out)
    assert code == 0, output
    assert run("gate", out)[0] == 0
    assert run("gate", out, "--require-live")[0] == 1
    code, output = run("layers", *common, "--reference", "bitnet.cpp", "--candidate", trace, "--receipt", out)
    assert code == 0, output
    assert run("gate", out, "--allow-compute", "recorded")[0] == 1  # bitnet.cpp against itself


def test_both_engines_give_the_same_answers(shipped_model, tmp_path):
    out = tmp_path / "smoke.json"
    code, output = run("smoke", "--engine", "both", "--model", shipped_model, "--receipt", out)
    assert code in (0, 1), output
    assert "texts equal: 10 of 10" in output
    made = receipt.read(out)
    rows = made["results"]["rows"]
    assert [row["token_ids"] for row in rows[::2]] == [row["token_ids"] for row in rows[1::2]]
    assert made["tokenizer"]["engines_agree"] is True
    assert made["reference"]["status"] == "live"


def test_both_engines_know_the_fixed_ten(shipped_model, tmp_path):
    out = tmp_path / "smoke.json"
    args = ("smoke", "--engine", "both", "--model", shipped_model, "--min-correct", "10/10", "--receipt", out)
    code, output = run(*args)
    assert code == 0, output
    code, output = run("gate", out, "--require-live", "--min-exact-match", "1", "--min-correct", "1")
    assert code == 0, output


def test_the_reference_alone(shipped_model, tmp_path):
    out = tmp_path / "smoke.json"
    suite = tmp_path / "q.jsonl"
    suite.write_text('{"prompt": "What is 2+2?", "answer": "x"}\n')
    code, output = run(
        "smoke", "--suite", suite, "--engine", "reference", "--reference", "bitnet.cpp", "--model", shipped_model,
        "--max-tokens", "3", "--receipt", out,
    )  # fmt: skip
    assert code == 1, output
    made = receipt.read(out)
    assert (made["reference"]["name"], made["candidate"]["status"]) == ("bitnet.cpp", "unused")


def test_both_engines_are_measured_and_compute_the_same(five_layers, tmp_path):
    path = tmp_path / "r.json"
    words = ("--prompt-tokens", "20", "--decode", "3", "--rounds", "2", "--threads", "2", "--receipt", path)
    code, output = run("bench", "--model", five_layers, *words)
    assert code == 0, output
    made = receipt.read(path)
    assert made["reference"]["name"] == "bitnet.cpp"
    assert made["parity"] == {
        "cosine_similarity": None,
        "exact_match_rate": 1.0,
        "logits_exact_match_rate": None,
        "cpp_available": True,
        "status": "pass",
    }
    assert made["coverage"]["compared"] == 3 * (1 + 3 + 3) + 3
    code, output = run("gate", path, "--require-live", "--require-bitwise")
    assert code == 0, output


def test_metamorphic_checks_both_engines(shipped_model, tmp_path):
    path = tmp_path / "r.json"
    words = ("--model", shipped_model, "--engine", "both", "--prompt", "Hello", "--receipt", path)
    code, output = run("metamorphic", *words)
    assert code == 0, output
    made = receipt.read(path)
    assert {row["party"] for row in made["results"]["rows"]} == {"candidate", "reference"}
    assert made["results"]["summary"]["reference"]["verdict"] == "holds"
    code, output = run("gate", path, "--require-live")
    assert code == 0, output
