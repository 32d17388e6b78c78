"""`crossval smoke` with real bitnet.cpp: the same texts, and what the shipped model knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from crossval.cli import cli
from crossval.receipts import file as receipt

pytestmark = pytest.mark.live


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def use_library(bitnet_cpp_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_CPP_LIB", str(bitnet_cpp_library))


def test_both_engines_give_the_same_answers(shipped_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    code, output = run("smoke", "--engine", "both", "--model", shipped_model, "--receipt", out)
    assert code in (0, 1), output
    assert "texts equal: 10 of 10" in output
    made = receipt.read(out)
    rows = made["results"]["rows"]
    assert [row["token_ids"] for row in rows[::2]] == [row["token_ids"] for row in rows[1::2]]
    assert made["tokenizer"]["engines_agree"] is True
    assert made["reference"]["status"] == "live"


def test_both_engines_know_the_fixed_ten(shipped_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    args = ("smoke", "--engine", "both", "--model", shipped_model, "--min-correct", "10/10", "--receipt", out)
    code, output = run(*args)
    assert code == 0, output
    code, output = run("gate", out, "--require-live", "--min-exact-match", "1", "--min-correct", "1")
    assert code == 0, output


def test_the_reference_alone(shipped_model: Path, tmp_path: Path) -> None:
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
