"""The command line with real bitnet.cpp, end to end: parity, receipts, the gate."""

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


def test_layers_and_greedy_pass_the_strictest_gate(shipped_model: Path, tmp_path: Path) -> None:
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


def test_a_recorded_bitnet_cpp_is_a_reference_too(shipped_model: Path, tmp_path: Path) -> None:
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
