"""Real bitnet.cpp as the candidate: against another build of itself, our engine, and with long prompts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from crossval.bitnet_cpp import builder
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.library import default_build_dir
from crossval.bitnet_cpp.remedies import SOURCE_VARIABLE
from crossval.receipts import file as receipt
from tests.support.strangers import run

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("use_bitnet_cpp")]

TIES = "What month comes after May?"
"""A prompt with activations so near a rounding tie that gcc's fused quantiser chooses another integer."""
LONG = "The quick brown fox jumps over the lazy dog and runs away. " * 24
"""More than 512 tokens of the shipped model."""


@pytest.fixture(scope="session")
def gcc_library() -> Path:
    """A build by gcc, whose activation quantiser rounds once where clang's rounds twice."""
    source = os.environ.get(SOURCE_VARIABLE)
    if not source or shutil.which("gcc") is None or shutil.which("g++") is None:
        pytest.skip(f"a second build needs gcc, g++ and {SOURCE_VARIABLE}=<bitnet.cpp checkout>")
    described = cpp_source.describe(Path(source).resolve(), "directory")
    build_dir = default_build_dir().with_name("bitnet.cpp-gcc")
    return builder.build(described, builder.Options(build_dir, cc="gcc")).path


def test_two_builds_run_at_once_and_where_they_round_differently_is_said(
    gcc_library: Path, shipped_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    words = ("--candidate", f"bitnet.cpp:{gcc_library}", "--reference", "bitnet.cpp")
    result = run("layers", "--prompt", TIES, "--model", shipped_model, *words, "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert made["verdict"] == "parity"
    assert (made["first_inexact"]["tap"], made["first_inexact"]["pass_index"]) == ("blk.0.q", 0)
    shown = " ".join(result.stdout.split())
    lanes = made["reference"]["numerics"]["simd_width"]
    assert f"candidate: march, {lanes} lanes, fused quantiser; reference: march, {lanes} lanes" in shown
    assert "bits need not be equal: at blk.0.q, quantiser and rescale differ" in shown
    assert made["candidate"]["library_digest"] != made["reference"]["library_digest"]
    assert made["settings"]["candidate"] == "bitnet.cpp:bitnet.cpp-gcc"
    assert run("gate", out, "--require-live").exit_code == 0
    assert "bitnet.cpp:bitnet.cpp-gcc against bitnet.cpp (live)" in result.stdout


def test_one_build_on_both_sides_is_no_comparison(shipped_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ("--candidate", "bitnet.cpp", "--reference", "bitnet.cpp")
    result = run("layers", "--prompt", "Hello", "--model", shipped_model, *words, "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert any("candidate and reference have the same library_digest" in note for note in made["notes"])
    assert (made["compute"]["path"], made["parity"]["exact_match_rate"]) == ("library", 1.0)
    gate = run("gate", out)
    assert gate.exit_code == 1
    assert "the candidate's bitnet.cpp against the reference's bitnet.cpp (live)" in result.stdout


def test_our_engine_as_the_reference_follows_the_candidate(
    bitnet_cpp_library: Path, shipped_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    words = ("--candidate", f"bitnet.cpp:{bitnet_cpp_library}", "--reference", "bitnet_py")
    result = run("greedy", "--prompt", TIES, "--steps", "4", "--model", shipped_model, *words, "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert made["reference"]["numerics"] == made["candidate"]["numerics"]
    assert made["parity"]["logits_exact_match_rate"] == 1.0
    assert run("gate", out, "--reference-name", "bitnet_py").exit_code == 0


def test_every_command_takes_the_word_of_a_build(
    bitnet_cpp_library: Path, shipped_model: Path, tmp_path: Path
) -> None:
    word = f"bitnet.cpp:{bitnet_cpp_library}"
    common = ("--model", shipped_model)
    trace = tmp_path / "trace"
    prompt = ("--prompt", "Hello", "--decode", "1")
    assert run("record", *prompt, *common, "--engine", word, "--out", trace, "--outline").exit_code == 0
    assert run("smoke", *common, "--candidate", word).exit_code == 0
    lengths = ("--lengths", "2", "--thread-counts", "1")
    result = run("metamorphic", *common, "--candidate", word, *lengths)
    assert result.exit_code == 0, result.output
    result = run("layers", *prompt, *common, "--candidate", "spec", "--reference", word, "--floors", "--causal")
    assert result.exit_code == 0, result.output


def test_a_prompt_longer_than_a_pass_is_cut_as_bitnet_cpp_cuts_it(shipped_model: Path, tmp_path: Path) -> None:
    layers, greedy = tmp_path / "layers.json", tmp_path / "greedy.json"
    common = ("--prompt", LONG, "--model", shipped_model, "--reference", "bitnet.cpp")
    result = run("layers", *common, "--decode", "1", "--receipt", layers)
    assert result.exit_code == 0, result.output
    assert run("greedy", *common, "--steps", "2", "--receipt", greedy).exit_code == 0
    made = receipt.read(layers)
    n_prompt = len(made["prompt"]["token_ids"])
    assert [len(one["token_ids"]) for one in made["results"]["passes"]] == [512, n_prompt - 512, 1]
    assert made["parity"]["exact_match_rate"] == 1.0
    assert run("gate", layers, greedy, "--require-bitwise").exit_code == 0
