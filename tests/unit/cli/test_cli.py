"""The command line by exact exit code, with real engines: ours, the specification, and recorded traces."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import crossval.cli.gate as gate_command
import crossval.engines.session as session_module
from bitnet_py import _native
from bitnet_py.gguf import GGUFFile
from crossval.cli import app, cli, docs, greedy
from crossval.engines import doctor
from crossval.engines import registry as select
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.doctor import PartCheck
from crossval.errors import EngineCrashError, UnavailableError
from crossval.receipts import file as receipt
from crossval.receipts.policy import Policy
from tests.support.gguf_bytes import string
from tests.support.strangers import PROMPT, Fault, error_line, run

ROOT = Path(__file__).parents[3]


# Help and documentation


COMMANDS = sorted(cli.commands)


def test_the_commands_of_the_contract_exist() -> None:
    assert {"layers", "greedy", "diff", "gate", "doctor", "record"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_documented_options(name: str) -> None:
    text = inspect.cleandoc(cli.commands[name].help or "")
    assert f"crossval {name}" in text.partition("Example:")[2]
    for param in cli.commands[name].params:
        assert param.param_type_name == "argument" or getattr(param, "help", None), param.name
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_documentation(name: str) -> None:
    assert f"## crossval {name}\n" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def test_the_documentation_is_current() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == docs.commands_markdown(), "renew with: python -m crossval.cli.docs > docs/commands.md"


# Exit 0


def test_layers_with_a_recorded_reference(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    assert result.exit_code == 0, result.output
    assert "PARITY  bitnet_py against bitnet.cpp (recorded): 15 of 15 comparisons, all bits equal" in result.stdout
    assert str(out) in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    made = receipt.read(out)
    assert made["verdict"] == "parity"
    assert made["parity"] == {
        "cosine_similarity": 1.0,
        "exact_match_rate": 1.0,
        "logits_exact_match_rate": 1.0,
        "cpp_available": True,
        "status": "parity",
    }
    assert made["compute"]["path"] == "real"
    assert any("i2s" in kernel["name"] and kernel["calls"] > 0 for kernel in made["compute"]["kernels"])
    assert made["settings"]["reference"] == golden.name
    assert str(golden.parent) not in out.read_text()
    assert run("gate", out).exit_code == 0


def test_json_mode_prints_the_receipt_and_nothing_else(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out, "--json")
    result = run("layers", *args)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == receipt.read(out)
    assert result.stderr == ""


def test_full_compares_every_operation(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out, "--full")
    assert run("layers", *args).exit_code == 0
    assert len(receipt.read(out)["results"]["rows"]) == 3 * 43
    assert run("gate", out).exit_code == 0


def test_layers_against_the_specification(model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--decode", "1", "--receipt", out)
    result = run("layers", *args, "--reference", "spec")
    assert result.exit_code == 0, result.output
    assert "bitnet.cpp" not in result.stdout
    made = receipt.read(out)
    assert made["parity"]["cpp_available"] is False
    assert made["parity"]["exact_match_rate"] < 1.0
    assert made["thresholds"]["policy"] == "independent"
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--reference-name", "specification").exit_code == 0


def test_the_specification_as_candidate_needs_the_policys_consent(
    model_path: Path, golden: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--receipt", out)
    assert run("layers", *args, "--candidate", "spec", "--reference", golden).exit_code == 0
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--allow-compute", "specification").exit_code == 0


def test_greedy(model_path: Path, record: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    golden = record(n_decode=5)
    args = ("--prompt", PROMPT, "--steps", "6", "--model", model_path, "--reference", golden, "--receipt", out)
    result = run("greedy", *args)
    assert result.exit_code == 0, result.output
    assert "6/6" in result.stdout
    made = receipt.read(out)
    assert (made["kind"], made["parity"]["exact_match_rate"]) == ("greedy", 1.0)
    assert run("gate", out, "--min-exact-match", "1", "--min-tokens", "6").exit_code == 0
    assert run("gate", out, "--min-tokens", "7").exit_code == 1


def test_greedy_without_an_audit_is_no_parity(
    model_path: Path, record: Callable[..., Path], shipped_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "g.json"
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
def test_greedy_over_many_prompts_finds_a_golden_for_each(
    model_path: Path, record: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    shutil.copy(model_path, model)
    for index, prompt in enumerate((PROMPT, "Another one")):
        shutil.copytree(record(prompt=prompt), tmp_path / "m.goldens" / f"g{index}")
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{PROMPT}\n\nAnother one\n")
    out = tmp_path / "g.json"
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


def test_diff(model_path: Path, record: Callable[..., Path], golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    other = record(name="other")
    result = run("diff", other, golden, "--model", model_path, "--receipt", out)
    assert result.exit_code == 0, result.output
    assert receipt.read(out)["settings"]["n_decode"] == 2
    # Two parties by name, but one build of one library: not a comparison of two engines.
    assert run("gate", out, "--allow-compute", "recorded").exit_code == 1


def test_a_trace_compared_with_itself_is_no_evidence(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    assert run("diff", golden, golden, "--model", model_path, "--receipt", out).exit_code == 0
    result = run("gate", out, "--allow-compute", "recorded")
    assert result.exit_code == 1
    assert "same name" in result.stdout


def test_record_then_compare(model_path: Path, tmp_path: Path) -> None:
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


# Exit 1


@pytest.mark.parametrize("layer", [0, 1])
def test_a_broken_operation_is_named(
    model_path: Path, record: Callable[..., Path], layer: int, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    golden = record(fault=Fault(rolled_from=f"{layer}/ffn_sub_norm"))
    args = ("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden)
    table, as_json = run(*args, "--receipt", out), run(*args, "--json")
    assert (table.exit_code, as_json.exit_code) == (1, 1)
    assert f"first divergence: layer {layer}, op ffn_sub_norm (pass 0, prefill" in table.stdout
    made = json.loads(as_json.stdout)
    assert (made["verdict"], made["parity"]["status"]) == ("reference_defect", "divergence")
    place = made["first_divergence"]
    assert (place["layer"], place["tap"]) == (layer, f"blk.{layer}.ffn_sub_norm")
    result = run("gate", out)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_a_tokenizer_that_disagrees_is_a_divergence(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = BitnetPyRunner.tokenize
    monkeypatch.setattr(BitnetPyRunner, "tokenize", lambda self, text, **options: honest(self, text)[::-1])
    out = tmp_path / "r.json"
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    assert result.exit_code == 1
    assert "the tokenizers disagree at token 0" in result.stdout
    assert receipt.read(out)["tokenizer"]["engines_agree"] is False
    assert run("gate", out).exit_code == 1


# Exit 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("layers",),
        ("layers", "--prompt", "x", "--threads", "0"),
        ("layers", "--prompt", "x", "--decode", "-1"),
        ("layers", "--prompt", "x", "--template", "nope"),
        ("layers", "--prompt", "x", "--nope"),
        ("greedy",),
        ("greedy", "--prompt", "x", "--prompts", "y"),
        ("greedy", "--prompt", "x", "--steps", "0"),
        ("diff", "one"),
        ("gate",),
        ("gate", "r.json", "--min-exact-match", "2"),
        ("gate", "r.json", "--model-sha256", "abc"),
        ("nope",),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


# Exit 3


@pytest.mark.usefixtures("no_bitnet_cpp")
@pytest.mark.parametrize("command", ["layers", "greedy"])
@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
def test_no_reference_is_exit_3_with_something_to_do(
    command: str, word: str, model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    args = (command, "--prompt", PROMPT, "--model", model_path, "--reference", word)
    result = run(*args)
    assert result.exit_code == 3
    assert "make fetch-cpp" in error_line(result)
    assert result.stdout == ""
    result = run(*args, "--json", "--receipt", out)
    assert result.exit_code == 3
    made = json.loads(result.stdout)
    assert made == receipt.read(out)
    assert (made["verdict"], made["reference"]["status"]) == ("incomplete", "unavailable")
    assert made["parity"]["exact_match_rate"] is made["parity"]["cosine_similarity"] is None
    assert run("gate", out).exit_code == 1


def test_a_trace_that_ends_too_early_is_incomplete(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    result = run("layers", *args, "--decode", "4")
    assert result.exit_code == 3
    assert "INCOMPLETE" in result.stdout
    assert "not compared: pass 3 inp_embd: only 3 of 5 passes are recorded alike" in result.stdout
    assert run("gate", out).exit_code == 1
    result = run("greedy", *args, "--steps", "9")
    assert result.exit_code == 3
    assert receipt.read(out)["coverage"] == {
        "required": 9,
        "compared": 3,
        "skipped": [{"prompt_index": 0, "n_steps": 6, "why": "only 3 of 9 passes are recorded alike"}],
    }


# Exit 4


def test_missing_model(tmp_path: Path) -> None:
    result = run("layers", "--prompt", PROMPT, "--model", tmp_path / "none.gguf")
    assert result.exit_code == 4
    assert "none.gguf" in error_line(result)


@pytest.mark.parametrize("command", ["layers", "greedy", "record"])
def test_empty_prompt(command: str, tmp_path: Path) -> None:
    extra = ("--out", tmp_path / "t") if command == "record" else ()
    result = run(command, "--prompt", "", *extra)
    assert result.exit_code == 4
    assert "prompt is empty" in error_line(result)


def test_a_prompt_that_is_not_utf_8() -> None:
    result = run("layers", "--prompt", "bad \udcff byte")
    assert result.exit_code == 4
    assert "UTF-8" in error_line(result)


def test_a_prompt_longer_than_the_context(make_model: Callable[..., Path]) -> None:
    model = make_model(context_length=64)
    result = run("layers", "--prompt", "many words " * 60, "--model", model, "--reference", "spec")
    assert result.exit_code == 4
    assert "context holds 64" in error_line(result)


@pytest.mark.parametrize("damage", ["magic", "truncated", "empty", "token", "nan"])
def test_a_damaged_model(damage: str, model_path: Path, tmp_path: Path) -> None:
    data = bytearray(model_path.read_bytes())
    if damage == "magic":
        data[:4] = b"GGML"
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "token":
        with GGUFFile.open(model_path) as gguf:
            held = b"".join(map(string, gguf.metadata["tokenizer.ggml.tokens"][20:30]))
        data[data.index(held) + 8] = 0xFF
    else:
        with GGUFFile.open(model_path) as gguf:
            start = gguf.tensors["token_embd.weight"].offset
            held = bytes(gguf.data("token_embd.weight")[:64])
        start = data.find(held, start)
        data[start + 10 : start + 12] = b"\x00\x7e"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    result = run("layers", "--prompt", PROMPT, "--model", broken, "--reference", "spec", "--json")
    assert result.exit_code == 4
    assert "broken.gguf" in error_line(result)
    assert damage != "token" or "key 'tokenizer.ggml.tokens', string 20 " in error_line(result)
    assert result.stdout == ""


def test_a_trace_of_another_model(make_model: Callable[..., Path], golden: Path) -> None:
    other = make_model(n_layers=3)
    result = run("layers", "--prompt", PROMPT, "--model", other, "--reference", golden)
    assert result.exit_code == 4
    assert "another model" in error_line(result)


def test_a_trace_of_another_prompt(model_path: Path, golden: Path) -> None:
    result = run("layers", "--prompt", "Something else", "--model", model_path, "--reference", golden)
    assert result.exit_code == 4
    assert "other tokens" in error_line(result)


def test_diff_of_what_is_no_trace(model_path: Path, golden: Path, tmp_path: Path) -> None:
    for first, expected in ((tmp_path / "none", "not a directory"), (tmp_path, "no finished trace")):
        result = run("diff", first, golden, "--model", model_path)
        assert result.exit_code == 4
        assert expected in error_line(result)


def test_diff_of_different_prompts(model_path: Path, record: Callable[..., Path], golden: Path) -> None:
    result = run("diff", record(prompt="Another one"), golden, "--model", model_path)
    assert result.exit_code == 4
    assert "different prompts" in error_line(result)


def test_a_template_whose_tokens_the_model_lacks(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = model_path.read_bytes()
    assert b"<|eot_id|>" in data
    model = tmp_path / "renamed.gguf"
    model.write_bytes(data.replace(b"<|eot_id|>", b"<|eot_xx|>"))
    args = ("layers", "--prompt", PROMPT, "--decode", "0", "--reference", "spec", "--template", "bitnet")
    assert run(*args, "--model", model_path).exit_code == 0
    result = run(*args, "--model", model)
    assert result.exit_code == 4
    assert "no token '<|eot_id|>', which template bitnet needs" in error_line(result)


def test_goldens_of_different_builds_do_not_make_one_reference(
    model_path: Path, record: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "find_golden", lambda path, sha256, prompt: tmp_path / prompt)
    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", lambda: None)
    for prompt, digest in ((PROMPT, "f" * 64), ("Another one", "e" * 64)):
        shutil.copytree(record(prompt=prompt), tmp_path / prompt)
        file = tmp_path / prompt / "trace.json"
        file.write_text(file.read_text().replace("f" * 64, digest))
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{PROMPT}\nAnother one\n")
    result = run("greedy", "--prompts", prompts, "--steps", "3", "--model", model_path)
    assert result.exit_code == 4
    assert "different builds of bitnet.cpp" in error_line(result)


def test_a_receipt_that_cannot_be_written(model_path: Path, golden: Path, tmp_path: Path) -> None:
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", tmp_path)
    assert result.exit_code == 4
    assert "cannot write the receipt" in error_line(result)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b'{"text": "x"}\n', "p.jsonl:1"),
        ("p.jsonl", b'"fine"\n{"prompt": ""}\n', "p.jsonl:2"),
        ("p.jsonl", b"{\n", "p.jsonl:1"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, name: str, text: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    result = run("greedy", "--prompts", path)
    assert result.exit_code == 4
    assert expected in error_line(result)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"one"\n\n{"prompt": "two\\nlines", "id": 7}\n')
    assert greedy.read_prompts(path) == ["one", "two\nlines"]
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n  two \u2028 still two\n".encode())
    assert greedy.read_prompts(path) == ["one", "  two \u2028 still two"]


def test_a_forced_kernel_that_does_not_exist(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITNET_KERNEL", "nope")
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden)
    assert result.exit_code == 4
    assert "nope" in error_line(result)


# The compute path


def test_a_kernel_that_was_asked_for_is_no_fallback(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    assert run("layers", *args).exit_code == 0
    made = receipt.read(out)
    assert made["candidate"]["settings"]["kernel"] == "scalar"
    assert made["compute"]["fallback"] is False
    assert {kernel["name"].rpartition("_")[2] for kernel in made["compute"]["kernels"]} == {"scalar"}


@pytest.mark.parametrize(
    ("used", "asked", "fallback"),
    [("fast", "", False), ("slow", "", True), ("slow", "slow", False), (None, "", True)],
)
def test_fallback_is_a_slower_kernel_unasked(
    used: str | None, asked: str, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = [
        _native.KernelFamily("fastest", "", False),
        _native.KernelFamily("fast", "", True),
        _native.KernelFamily("slow", "", True),
    ]
    monkeypatch.setattr(_native, "kernel_families", lambda: families)
    monkeypatch.setenv("BITNET_KERNEL", asked)
    assert session_module.is_fallback(used) is fallback


def test_a_fallback_fails_the_gate(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    families = [_native.KernelFamily("faster still", "", True), *_native.kernel_families()]
    monkeypatch.setattr(_native, "kernel_families", lambda: families)
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    assert run("layers", *args).exit_code == 0
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--allow-fallback").exit_code == 0


# Exit 5


def test_a_crash_is_exit_5_and_keeps_the_log(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise EngineCrashError("the child died with SIGABRT\n  GGML_ASSERT failed")

    monkeypatch.setattr(session_module, "open_reference", crash)
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--json")
    assert result.exit_code == 5
    assert result.stderr == "error: the child died with SIGABRT\n  GGML_ASSERT failed\n"
    assert result.stdout == ""


def test_an_unexpected_exception_is_exit_5_without_a_traceback(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(session_module, "open_reference", surprise)
    result = run("layers", "--prompt", PROMPT, "--model", model_path)
    assert result.exit_code == 5
    assert "KeyError: 'surprise'" in error_line(result)
    result = run("--debug", "layers", "--prompt", PROMPT, "--model", model_path)
    assert result.exit_code == 5
    assert "Traceback" in result.stderr
    monkeypatch.setenv(app.DEBUG_VARIABLE, "1")
    assert "Traceback" in run("layers", "--prompt", PROMPT, "--model", model_path).stderr


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 5), (UnavailableError("x"), 3)]
)
def test_other_ways_out(
    error: BaseException, code: int, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(session_module, "open_reference", leave)
    result = run("layers", "--prompt", PROMPT, "--model", model_path)
    assert result.exit_code == code
    error_line(result)


# gate


@pytest.fixture(scope="session")
def good_receipt(model_path: Path, record: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("receipts") / "good.json"
    assert (
        run(
            "layers", "--prompt", PROMPT, "--model", model_path, "--reference", record(), "--receipt", out
        ).exit_code
        == 0
    )
    return out


def test_gate_exit_codes_of_several_receipts(good_receipt: Path, tmp_path: Path) -> None:
    edited, garbage = tmp_path / "edited.json", tmp_path / "garbage.json"
    edited.write_text(good_receipt.read_text().replace('"notes": []', '"notes": ["x"]'))
    garbage.write_text("{}")
    assert run("gate", good_receipt).exit_code == 0
    assert run("gate", good_receipt, edited).exit_code == 1
    assert run("gate", edited, good_receipt).exit_code == 1
    assert run("gate", edited, garbage, good_receipt).exit_code == 4
    assert run("gate", tmp_path / "none.json").exit_code == 4
    result = run("gate", garbage)
    assert "garbage.json" in error_line(result)


def test_gate_as_json(good_receipt: Path, tmp_path: Path) -> None:
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
def test_zero_is_a_value_and_overrides_the_policy_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Policy] = []
    monkeypatch.setattr("crossval.cli.gate.judge", lambda made, policy: held.append(policy) or [])
    monkeypatch.setattr("crossval.receipts.file.read", lambda path: {})
    policy, option = tmp_path / "policy.json", "--" + name.replace("_", "-")
    policy.write_text(json.dumps({"schema_version": 1, name: 0.75}))
    for more, expected in (((), 0.75), ((option, "0"), 0.0), ((option, "0.5"), 0.5)):
        run("gate", "r.json", "--policy", policy, *more)
        assert getattr(held[-1], name) == expected
        assert held[-1].require_live is False


def test_gate_options_override_the_policy_file(good_receipt: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"schema_version": 1, "require_live": True, "model_sha256": ["0" * 64]}))
    result = run("gate", good_receipt, "--policy", policy)
    assert result.exit_code == 1
    sha256 = receipt.read(good_receipt)["model"]["sha256"]
    policy.write_text(json.dumps({"schema_version": 1, "model_sha256": ["0" * 64]}))
    assert run("gate", good_receipt, "--policy", policy).exit_code == 1
    assert run("gate", good_receipt, "--policy", policy, "--model-sha256", sha256).exit_code == 0
    policy.write_text("{")
    assert run("gate", good_receipt, "--policy", policy).exit_code == 4


def test_no_receipt_is_no_pass() -> None:
    assert gate_command.exit_code([]) == 1


# doctor


OK = PartCheck("engine", True, "fine")
LIVE = PartCheck("bitnet.cpp library", True, "there", required=False, reference=True)
NO_LIVE = PartCheck("bitnet.cpp library", False, "not built", "make fetch-cpp", required=False)
GOLDENS = PartCheck("goldens (recorded bitnet.cpp)", True, "10", required=False, reference=True)
BROKEN = PartCheck("engine C library", False, "missing", "pip install .")


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([OK, LIVE], 0),
        ([OK, NO_LIVE, GOLDENS], 0),
        ([OK, NO_LIVE], 3),
        ([OK], 3),
        ([OK, LIVE, BROKEN], 4),
        ([], 4),
    ],
)
def test_doctor_exit_codes(checks: list[PartCheck], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "collect", lambda: checks)
    result, as_json = run("doctor"), run("doctor", "--json")
    assert (result.exit_code, as_json.exit_code) == (code, code)
    report = json.loads(as_json.stdout)
    assert report["ok"] == (code == 0)
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks]
    for check in checks:
        assert check.remedy in result.stdout


# A real process


def test_the_console_entry_as_a_process(model_path: Path, golden: Path) -> None:
    command = [sys.executable, "-m", "crossval", "layers", "--prompt", PROMPT, "--model", str(model_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--reference", str(golden)], capture_output=True, cwd=ROOT, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"PARITY" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_a_reader_that_goes_away_is_no_verdict(model_path: Path, golden: Path) -> None:
    command = [sys.executable, "-m", "crossval", "layers", "--prompt", PROMPT, "--model", str(model_path)]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*command, "--reference", str(golden), "--json"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
