"""``crossval printed`` and ``crossval import-dump`` on what real libraries printed and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import crossval
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.receipts import file as receipt
from crossval.traces.read import Trace
from tests.support.strangers import error_line, run

DATA = Path(__file__).parents[2] / "data" / "printed"
MARCH, MAIN = DATA / "march.txt", DATA / "main.txt"
PROMPT = "What is 2+2?"


def test_a_dump_of_bitnet_cpp_agrees_as_far_as_printed_and_is_no_parity(shipped_model: Path) -> None:
    result = run("printed", MARCH, "--prompt", PROMPT, "--model", shipped_model)
    assert result.exit_code == 3, result.output
    assert "AGREES AS FAR AS PRINTED  690 of 690 printed values are alike, in 17 taps" in result.stdout
    assert "node names of bitnet.cpp-march" in result.stdout
    assert "PARITY" not in result.stdout


def test_the_wrong_activation_of_main_is_seen_where_it_enters(shipped_model: Path) -> None:
    """microsoft/BitNet#588: main computes SiLU in a model of squared ReLU."""
    found = crossval.compare_printed(MAIN, PROMPT, shipped_model)
    assert (found.verdict, found.tap_map) == ("differs", "bitnet.cpp-main")
    taps = [row.tap for row in found.rows]
    first = taps.index("blk.0.ffn_out")
    assert first > 5
    assert found.first_beyond == found.rows[first]
    assert all(row.n_alike == row.n_values > 0 for row in found.rows[:first])
    followed = crossval.compare_printed(MAIN, PROMPT, shipped_model, follow_reference_graph=True)
    assert (followed.verdict, sum(row.n_alike for row in followed.rows)) == ("agrees as far as printed", 558)


def test_a_difference_is_exit_1_with_its_place_and_no_blame(shipped_model: Path) -> None:
    result = run("printed", MAIN, "--prompt", PROMPT, "--model", shipped_model, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"] == "differs"
    text = " ".join(run("printed", MAIN, "--prompt", PROMPT, "--model", shipped_model).stdout.split())
    assert "first at blk.0.ffn_out" in text
    assert "Which of the two is wrong there is not shown" in text


@pytest.mark.parametrize(("units", "verdict"), [(1, "agrees as far as printed"), (2, "differs")])
def test_one_unit_of_the_last_digit_is_the_limit(
    shipped_model: Path, tmp_path: Path, units: int, verdict: str
) -> None:
    text = MARCH.read_text()
    value = re.compile(r"-?\d+\.\d{4}").search(text, text.index("[  ", text.index("l_out-2 =")))
    assert value is not None
    moved = f"{float(value[0]) + units * 1e-4:.4f}"
    (tmp_path / "d.txt").write_text(text[: value.start()] + moved + text[value.end() :])
    found = crossval.compare_printed(tmp_path / "d.txt", PROMPT, shipped_model)
    assert found.verdict == verdict
    (row,) = [row for row in found.rows if row.n_alike < row.n_values]
    assert (row.tap, row.n_values - row.n_alike, row.n_beyond) == ("blk.2.l_out", 1, units - 1)


def test_a_nan_that_only_one_side_has_differs(shipped_model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text(MARCH.read_text().replace("-6.1870", "    nan"))
    result = run("printed", tmp_path / "d.txt", "--prompt", PROMPT, "--model", shipped_model, "--json")
    assert result.exit_code == 1
    (row,) = [row for row in json.loads(result.stdout)["rows"] if row["n_beyond"]]
    assert (row["tap"], row["max_abs"]) == ("result_output", None)


@pytest.mark.parametrize(
    ("prompt", "match"), [("Hello", "the dump is not one of these"), ("", "the prompt is empty")]
)
def test_another_prompt_is_a_clean_error(shipped_model: Path, prompt: str, match: str) -> None:
    result = run("printed", MARCH, "--prompt", prompt, "--model", shipped_model)
    assert result.exit_code == 4
    assert match in error_line(result)


def test_other_tokens_differ_from_the_first_tensor_on(shipped_model: Path) -> None:
    result = run("printed", MARCH, "--prompt", "What is two and two?", "--model", shipped_model)
    assert result.exit_code == 1
    assert "first at inp_embd" in result.stdout
    assert "Check that the dump is of this prompt." in result.stdout


def test_a_dump_of_two_passes_is_refused(shipped_model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text(MARCH.read_text() * 2)
    result = run("printed", tmp_path / "d.txt", "--prompt", PROMPT, "--model", shipped_model)
    assert result.exit_code == 4
    assert "it holds several passes" in error_line(result)


def test_a_trace_stands_in_for_the_engine_and_what_it_lacks_is_said(shipped_model: Path, tmp_path: Path) -> None:
    words = ("--engine", "bitnet_py", "--prompt", PROMPT, "--out", tmp_path / "t", "--outline", "--decode", "0")
    assert run("record", *words, "--model", shipped_model).exit_code == 0
    result = run("printed", MARCH, "--prompt", PROMPT, "--engine", tmp_path / "t", "--model", shipped_model)
    assert result.exit_code == 3, result.output
    assert "values are alike, in 7 taps" in result.stdout
    assert "not compared: the engine does not have blk.0.attn_norm" in result.stdout


# --- saved logits ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(shipped_model: Path, tmp_path: Path) -> Path:
    """Return logits and tokens as ``llama-debug --save-logits`` writes them."""
    with BitnetPyRunner(shipped_model, n_threads=1) as runner:
        ids = runner.tokenize(PROMPT)
        logits = runner.eval(ids, ["result_output"]).taps["result_output"].array[-1]
    path = tmp_path / "llamacpp-bitnet-qa.bin"
    path.write_bytes(logits.astype("<f4").tobytes())
    path.with_name("llamacpp-bitnet-qa-tokens.bin").write_bytes(np.array(ids, "<i4").tobytes())
    return path


def test_saved_logits_become_a_trace_that_shows_what_it_holds(
    saved: Path, shipped_model: Path, tmp_path: Path
) -> None:
    result = run("import-dump", saved, "--out", tmp_path / "t", "--model", shipped_model)
    assert result.exit_code == 0, result.output
    trace = Trace.open(tmp_path / "t")
    trace.verify()
    assert trace.taps(0)["result_output"].array.tobytes() == saved.read_bytes()
    assert trace.info.engine.name == "llama.cpp"
    golden, path = shipped_model.with_suffix(".goldens") / "what-is-2-2", tmp_path / "r.json"
    assert run("diff", tmp_path / "t", golden, "--model", shipped_model, "--receipt", path).exit_code == 3
    rows = receipt.read(path)["results"]["rows"]
    assert [(row["tap"], row["status"]) for row in rows] == [("result_output", "equal")]


def tokens_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}-tokens.bin")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "holds 4092 bytes, the logits of 1024 tokens are"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "larger than 4096 bytes"),
        (lambda path: tokens_of(path).unlink(), "cannot read tokens"),
        (lambda path: tokens_of(path).write_bytes(b"123"), "not whole token ids"),
        (lambda path: tokens_of(path).write_bytes(b"\xff" * 4), "not of a vocabulary"),
        (lambda path: path.unlink(), "cannot read logits"),
    ],
)
def test_damaged_dumps_are_refused(
    saved: Path, shipped_model: Path, tmp_path: Path, damage: Callable[[Path], object], match: str
) -> None:
    damage(saved)
    result = run("import-dump", saved, "--out", tmp_path / "t", "--model", shipped_model)
    assert result.exit_code == 4
    assert match in error_line(result)


def test_printed_text_is_no_trace(shipped_model: Path, tmp_path: Path) -> None:
    result = run("import-dump", MARCH, "--out", tmp_path / "t", "--model", shipped_model)
    assert result.exit_code == 4
    assert "crossval printed march.txt" in error_line(result)
