"""``crossval greedy``: one prompt, many prompts, files of prompts."""

from __future__ import annotations

import json
import shutil

import pytest

from crossval import read_prompts
from crossval.engines import registry
from crossval.receipts import file as receipt
from tests.support.strangers import PROMPT, error_line, run


def test_all_tokens_equal(model_path, record, out):
    args = ("--prompt", PROMPT, "--steps", "6", "--model", model_path, "--reference", record(n_decode=5))
    result = run("greedy", *args, "--receipt", out)
    assert result.exit_code == 0, result.output
    assert "6/6" in result.stdout
    made = receipt.read(out)
    assert (made["kind"], made["parity"]["exact_match_rate"]) == ("greedy", 1.0)
    assert run("gate", out, "--min-exact-match", "1", "--min-tokens", "6").exit_code == 0
    assert run("gate", out, "--min-tokens", "7").exit_code == 1


def test_without_an_audit_there_is_no_parity(model_path, record, shipped_model, out):
    words = ("greedy", "--prompt", PROMPT, "--steps", "3", "--receipt", out, "--no-audit")
    result = run(*words, "--model", model_path, "--reference", record())
    assert result.exit_code == 3
    assert "INCOMPLETE" in result.stdout
    assert "100 % of the tokens equal, 100 % of the logits bit-equal" in result.stdout
    assert "logits bit-equal; arithmetic not audited." in result.stdout
    assert "Run it again without --no-audit" in result.stdout
    assert receipt.read(out)["audit"] == {"candidate": None, "reference": None}
    assert run("gate", out, "--min-exact-match", "1").exit_code == 1
    result = run(*words, "--model", shipped_model, "--reference", "spec")
    assert result.exit_code == 3
    assert "tokens agree; arithmetic not checked." in result.stdout


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_every_prompt_finds_its_golden(model_path, record, tmp_path, out):
    model = tmp_path / "m.gguf"
    shutil.copy(model_path, model)
    for index, prompt in enumerate((PROMPT, "Another one")):
        shutil.copytree(record(prompt=prompt), tmp_path / "m.goldens" / f"g{index}")
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{PROMPT}\n\nAnother one\n")
    result = run("greedy", "--prompts", prompts, "--steps", "3", "--model", model, "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert [prompt["text"] for prompt in made["results"]["prompts"]] == [PROMPT, "Another one"]
    assert len(made["reference"]["trace_digest"]) == 64
    assert run("gate", out).exit_code == 0
    # A third prompt has no golden: exit 3, and the message says which there are.
    prompts.write_text("No golden of this\n")
    result = run("greedy", "--prompts", prompts, "--model", model)
    assert result.exit_code == 3
    assert "Another one" in error_line(result)


def test_a_trace_that_ends_too_early_is_incomplete(model_path, golden, out):
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    assert run("greedy", *args, "--steps", "9").exit_code == 3
    assert receipt.read(out)["coverage"] == {
        "required": 9,
        "compared": 3,
        "skipped": [{"prompt_index": 0, "n_steps": 6, "why": "only 3 of 9 passes are recorded alike"}],
    }


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_goldens_of_different_builds_do_not_make_one_reference(model_path, record, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "find_golden", lambda path, sha256, prompt: tmp_path / prompt)
    for prompt, digest in ((PROMPT, "f" * 64), ("Another one", "e" * 64)):
        shutil.copytree(record(prompt=prompt), tmp_path / prompt)
        file = tmp_path / prompt / "trace.json"
        file.write_text(file.read_text().replace("f" * 64, digest))
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{PROMPT}\nAnother one\n")
    result = run("greedy", "--prompts", prompts, "--steps", "3", "--model", model_path)
    assert result.exit_code == 4
    assert "different builds of bitnet.cpp" in error_line(result)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b'{"text": "x"}\n', "p.jsonl:1"),
        ("p.jsonl", b'"fine"\n{"prompt": ""}\n', "p.jsonl:2"),
        ("p.jsonl", b"{\n", "p.jsonl:1"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_bytes(text)
    result = run("greedy", "--prompts", path)
    assert result.exit_code == 4
    assert expected in error_line(result)


def test_prompt_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"one"\n\n{"prompt": "two\\nlines", "id": 7}\n')
    assert read_prompts(path) == ["one", "two\nlines"]
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n  two \u2028 still two\n".encode())
    assert read_prompts(path) == ["one", "  two \u2028 still two"]


def test_our_own_right_engine_beside_the_specification_is_no_divergence(model_path, out):
    """Token 0 and later ones are near ties of this model: rounding decides them."""
    words = ("greedy", "--model", model_path, "--reference", "spec", "--tokens", "13,14,31", "--receipt", out)
    result = run(*words, "--steps", "14", "--threads", "1")
    made = receipt.read(out)
    assert (result.exit_code, made["verdict"]) == (0, "near_ties"), result.output
    assert made["first_divergence"]["step"] == 13
    assert made["first_divergence"]["near_tie"] is True
    assert sum(len(one["token_ids"]) for one in made["results"]["passes"]) == 3 + 13
    assert "PARITY" not in result.stdout
    assert "Audited: the first prompt's pass and 13 decoded tokens." in result.stdout
    assert "This is an audit of one engine, not parity of two." in result.stdout
    assert run("gate", out).exit_code == 1  # bitnet.cpp was not there
    assert run("gate", out, "--reference-name", "specification").exit_code == 0
    assert run("gate", out, "--reference-name", "specification", "--min-exact-match", "1").exit_code == 1
    unaudited = run(*words, "--steps", "14", "--threads", "1", "--no-audit")
    assert (unaudited.exit_code, receipt.read(out)["verdict"]) == (1, "divergence")


def test_near_ties_in_later_prompts_are_audited_too(model_path, out, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"tokens": [4, 9]}, {"tokens": [13, 14, 31]}, {"tokens": [5, 6, 7]}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    words = ("greedy", "--model", model_path, "--reference", "spec", "--threads", "1", "--receipt", out)
    result = run(*words, "--prompts", prompts, "--steps", "14")
    made = receipt.read(out)
    assert (result.exit_code, made["verdict"]) == (0, "near_ties"), result.output
    (further,) = made["results"]["further"]
    assert (further["prompt_index"], made["first_divergence"]["prompt_index"]) == (1, 1)
    assert sum(len(one["token_ids"]) for one in further["passes"]) == 3 + 13
    assert "Audited: the first prompt's pass and 1 decoded token." in result.stdout
    assert "Audited, too: prompt 1, up to its last token that differs." in result.stdout
    assert run("gate", out, "--reference-name", "specification").exit_code == 0
    again = ("--reference-name", "specification", "--model", model_path, "--rerun")
    assert run("gate", out, *again).exit_code == 0
    further["audit"]["candidate"]["rows"][0]["note"] = "forged"
    receipt.seal(made).save(out)
    forged = run("gate", out, *again)
    assert (forged.exit_code, "results.further" in forged.stdout) == (1, True)
