"""``crossval triage``: which side is wrong, why, what next; and ``--repro`` on every command that has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossval.audit import summary
from crossval.compare.rows import Skip
from crossval.examine import triage
from crossval.examine.layers_receipt import LAYERS
from crossval.examine.verdict import ADVICE
from crossval.receipts import file as receipt
from crossval.receipts.kind import build_unavailable
from crossval.receipts.party import Party
from tests.support import receipt_samples as samples
from tests.support.strangers import PROMPT, Fault, error_line, run

Record = Callable[..., Path]
ROLLED = Fault(rolled_from="1/ffn_sub_norm")
OTHER = Fault(rolled_from="0/ffn_sub_norm")
GUILTY = samples.audit_result({(1, "blk.1.ffn_act"): 8.0})


def told(made: receipt.Receipt) -> dict[str, str]:
    """Return label -> text; the steps under ``what to do``, joined."""
    lines: dict[str, str] = {}
    last = ""
    for label, text in triage.explain(made):
        last = label or last
        lines[last] = f"{lines[last]}\n{text}" if last in lines else text
    return lines


def words(errors: Any = None, candidate: Any = None, reference: Any = None, **changes: Any) -> dict[str, str]:
    return told(samples.layers_receipt(errors, samples.audits(candidate, reference), **changes))


# The three cases of the original question, and the others


def test_same_output_from_both_points_at_model_and_configuration() -> None:
    said = words(tokenizer={**samples.TOKENIZER, "pre": None})
    assert said["wrong side"] == (
        "none: bitnet_py and bitnet.cpp agree with each other and with the model's definition"
    )
    assert said["output"] == "the same from both: bit-identical"
    assert said["tokens"] == "both read the prompt as the same 3"
    assert "it is the model or how it is used" in said["what to do"]
    assert "tokenizer.ggml.pre is missing" in said["what to do"]
    assert "The prompt was given raw" in said["what to do"]
    assert "first wrong" not in said


def test_reference_right_and_candidate_wrong_is_the_candidates_bug() -> None:
    said = words({(1, "blk.1.l_out"): 0.9}, GUILTY)
    assert said["wrong side"].startswith("the candidate: bitnet_py is wrong")
    assert (
        said["output"] == "differs by more than rounding from layer 1, ops attn_norm to l_out (pass 1, decode) on"
    )
    assert said["first wrong"].startswith("candidate bitnet_py: layer 1, op ffn_act (pass 1, decode); position 3")
    assert said["why"].startswith("candidate: skipped (norms): The norm is skipped")
    steps = said["what to do"].splitlines()
    assert steps[0] == (
        "1. Fix layer 1, op ffn_act (pass 1, decode) in bitnet_py; everything before it is correct."
    )
    assert steps[1].endswith("crossval layers --prompt 'What is 2+2?' --repro repro")


def test_both_wrong_in_different_ways_points_at_what_both_are_given() -> None:
    other = samples.audit_result({(0, "blk.0.q"): 5.0})
    said = words({(0, "blk.0.l_out"): 0.9}, GUILTY, other, tokenizer={**samples.TOKENIZER, "pre": "default"})
    assert said["wrong side"].startswith("both, or what both are given")
    assert said["first wrong"].count("\n") == 1
    assert said["what to do"].startswith("1. Check what both are given: tokenizer and template, header values")
    assert "tokenizer.ggml.pre is default" in said["what to do"]


def test_the_reference_is_wrong() -> None:
    said = words({(1, "blk.1.l_out"): 0.9}, None, GUILTY)
    assert said["wrong side"] == "the reference: bitnet.cpp is wrong, bitnet_py does what the model defines"
    assert said["what to do"].startswith("1. Do not change bitnet_py to match bitnet.cpp.\n2. Report layer 1, op")


def test_both_wrong_in_the_same_way_points_at_what_they_share() -> None:
    said = words(None, GUILTY, GUILTY)
    assert said["wrong side"].startswith("a shared cause")
    assert said["output"] == "the same from both: bit-identical"
    assert said["what to do"].startswith("1. Suspect the file first")


def test_right_operations_that_differ_all_the_same_point_at_the_state() -> None:
    said = words({(0, "result_norm"): 0.9})
    assert said["wrong side"].startswith("no operation")
    assert "tokens, positions, KV cache" in said["what to do"]
    agree = words(tokenizer={**samples.TOKENIZER, "engines_agree": False})
    assert agree["tokens"] == "the tokenizers disagree (see the notes)"
    assert agree["output"] == "differs in the tokens it is made from"
    assert "Make the tokenizers agree first" in agree["what to do"]


def test_what_was_not_compared_is_never_anybodys_fault() -> None:
    skip = Skip(2, "blk.1.l_out", "the candidate did not give it")
    said = told(samples.build(samples.layers_result(skipped=(skip,))))
    assert said["wrong side"] == "not known: something that had to be compared was not"
    assert said["output"] == "not compared completely"
    assert "Not compared: the candidate did not give it." in said["what to do"]


def test_no_reference_says_how_to_get_one() -> None:
    nobody = Party("unavailable", samples.THEIRS, note="run make fetch-cpp")
    assert told(build_unavailable(LAYERS, samples.context(reference=nobody))) == {
        "wrong side": "not known: something that had to be compared was not",
        "what to do": "run make fetch-cpp",
    }


def test_within_bounds_is_not_called_equal() -> None:
    assert words({(0, "result_output"): 1e-6})["output"] == "the same from both: equal within rounding"


def test_every_verdict_has_its_words() -> None:
    assert set(triage._WRONG_SIDE) == set(ADVICE)


# The command


@pytest.mark.parametrize(
    ("theirs", "code", "whose"),
    [(None, 0, "none"), (ROLLED, 1, "the reference: bitnet.cpp is wrong")],
)
def test_triage_has_the_exit_code_and_receipt_of_layers(
    model_path: Path, record: Record, tmp_path: Path, theirs: Fault | None, code: int, whose: str
) -> None:
    out, again = tmp_path / "t.json", tmp_path / "l.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", record(fault=theirs))
    result = run("triage", *args, "--receipt", out)
    assert result.exit_code == code
    assert f"wrong side   {whose}" in result.stdout
    assert "result_output  " not in result.stdout, "no tables"
    assert run("layers", *args, "--receipt", again).exit_code == code
    ours, plain = receipt.read(out), receipt.read(again)
    assert (ours["verdict"], ours["audit"]) == (plain["verdict"], plain["audit"])
    assert run("gate", out).exit_code == code
    as_json = run("triage", *args, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["verdict"]) == (code, ours["verdict"])


def test_what_triage_says_is_in_the_receipt(model_path: Path, record: Record, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", record(fault=ROLLED))
    text = run("triage", *args, "--receipt", out).stdout
    for _, sentence in triage.explain(receipt.read(out)):
        assert sentence in text


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_triage_without_a_reference(model_path: Path) -> None:
    result = run("triage", "--prompt", PROMPT, "--model", model_path)
    assert result.exit_code == 3
    assert "make fetch-cpp" in error_line(result)


def test_triage_of_an_empty_prompt() -> None:
    result = run("triage", "--prompt", "")
    assert result.exit_code == 4
    assert "prompt is empty" in error_line(result)


def test_triage_of_the_shipped_model(shipped_model: Path) -> None:
    golden = shipped_model.with_suffix(".goldens") / "what-is-2-2"
    result = run("triage", "--prompt", "What is 2+2?", "--reference", golden)
    assert result.exit_code == 0, result.output
    assert "If the text is bad, it is the model or how it is used." in result.stdout


# --repro


def script_says(script: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize("command", ["layers", "triage", "diff"])
@pytest.mark.parametrize("mode", [(), ("--json",)])
def test_repro(model_path: Path, record: Record, tmp_path: Path, command: str, mode: tuple[str, ...]) -> None:
    golden, folder = record(fault=ROLLED), tmp_path / "new" / "repro"
    given = (record("other"), golden) if command == "diff" else ("--prompt", PROMPT, "--reference", golden)
    result = run(command, *given, "--model", model_path, "--repro", folder, *mode)
    assert result.exit_code == 1
    assert result.stderr == f"reproducer of the reference: {folder / 'repro.py'}\n"
    code, text = script_says(folder / "repro.py")
    assert code == 1
    assert text.startswith("wrong: ")
    assert "blk.1.ffn_sub_norm of bitnet.cpp" in (folder / "repro.py").read_text()
    if mode:
        assert json.loads(result.stdout)["verdict"] == "reference_defect"


def test_repro_of_two_guilty_engines(model_path: Path, record: Record, tmp_path: Path) -> None:
    args = (record("other", OTHER), record(fault=ROLLED), "--model", model_path, "--repro", tmp_path)
    result = run("diff", *args)
    assert result.stderr.splitlines() == [
        f"reproducer of the candidate: {tmp_path / 'repro.py'}",
        f"reproducer of the reference: {tmp_path / 'reference' / 'repro.py'}",
    ]
    assert "blk.0.ffn_sub_norm of other" in (tmp_path / "repro.py").read_text()
    assert "blk.1.ffn_sub_norm of bitnet.cpp" in (tmp_path / "reference" / "repro.py").read_text()


def test_no_guilt_no_reproducer(model_path: Path, golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, "--repro", folder)
    assert (result.exit_code, result.stderr) == (0, "no reproducer: no operation is wrong\n")
    assert not folder.exists()


@pytest.mark.usefixtures("unnamed_segments")
def test_a_coarse_trace_says_what_to_record(model_path: Path, record: Record, tmp_path: Path) -> None:
    outline = record(fault=ROLLED, taps=["inp_embd", "blk.0.l_out", "blk.1.l_out", "result_norm", "result_output"])
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", outline, "--repro", tmp_path / "repro")
    result = run("layers", *args)
    assert result.exit_code == 1
    assert result.stderr.startswith("no reproducer of the reference: the inputs of blk.1.l_out were not recorded")
    assert not (tmp_path / "repro").exists()


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    model_path: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr("crossval.api.comparison.examine", None)
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, "--repro", file)
    assert result.exit_code == 4
    assert "cannot write a reproducer" in error_line(result)


def test_the_same_audit_twice_gives_the_same_numbers(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.json", tmp_path / "b.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt")
    assert run("layers", *args, out).exit_code == run("layers", *args, again).exit_code == 0
    assert receipt.read(out)["audit"] == receipt.read(again)["audit"]
    assert summary.audit_verdict(receipt.read(out)["audit"]["candidate"]) == "clean"
