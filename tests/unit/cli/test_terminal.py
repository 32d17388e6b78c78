"""Token ids, stdin and stdout, color, how much is printed, defaults from the environment, completion."""

from __future__ import annotations

import io
import json

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from crossval.cli import cli, output
from crossval.receipts import file as receipt
from tests.support.strangers import PROMPT, Fault, error_line, run


def given(text, *words):
    return CliRunner().invoke(cli, list(map(str, words)), input=text, prog_name="crossval")


# --- token ids ------------------------------------------------------------------------------------------------


def test_token_ids_are_a_prompt(model_path, record, golden, out):
    ids = receipt_ids = json.loads((golden / "trace.json").read_text())["prompt"]["token_ids"]
    words = ("--tokens", ",".join(map(str, ids)), "--model", model_path, "--reference", golden, "--receipt", out)
    result = run("layers", *words)
    assert result.exit_code == 0, result.output
    assert f"prompt     tokens {','.join(map(str, receipt_ids))[:20]}" in result.stdout
    made = receipt.read(out)
    assert made["prompt"] == {"text": None, "template": None, "token_ids": ids}
    assert made["tokenizer"]["engines_agree"] is None
    assert run("gate", out, "--allow-compute", "none").exit_code == 0
    assert run("greedy", *words, "--steps", "3").exit_code == 0
    greedy = receipt.read(out)
    assert greedy["results"]["prompts"][0]["text"] is None
    assert run("gate", out).exit_code == 0
    assert run("show", out).stdout.count(",".join(map(str, ids))[:20]) == 2


def test_the_command_that_reproduces_names_the_ids(model_path, record, out):
    wrong = record(name="wrong", fault=Fault(rolled_from="1/ffn_sub_norm"))
    ids = json.loads((wrong / "trace.json").read_text())["prompt"]["token_ids"]
    shown = ",".join(map(str, ids))
    run(
        "layers",
        "--tokens",
        shown,
        "--model",
        model_path,
        "--candidate",
        wrong,
        "--reference",
        "spec",
        "--receipt",
        out,
    )
    command = receipt.read(out)["diagnosis"][0]["command"]
    assert f"--tokens {shown} " in command
    assert "--prompt" not in command


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("layers", "--tokens", "300"), 4, "token 300 is not in the vocabulary of"),
        (("layers", "--tokens", "1", "--prompt", "x"), 2, "exclude each other"),
        (("layers",), 2, "--prompt TEXT or --tokens"),
        (("layers", "--tokens", "1", "--template", "bitnet"), 2, "template bitnet applies to text"),
        (("greedy", "--tokens", "1", "--prompts", "x"), 2, "one of --prompt TEXT, --tokens"),
        (("metamorphic", "--tokens", "300"), 4, "token 300 is not in the vocabulary of"),
        (("triage", "--output", "-", "--tokens", "1"), 2, "--tokens is about engines"),
        (("greedy", "--tokens", "1", "--steps", "5000", "--reference", "spec"), 4, "let at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_ids_that_cannot_be_used(words, code, message, model_path, monkeypatch):
    result = given("", *words, *([] if "--model" in words else ["--model", model_path]))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_recorded_prompt_of_ids_is_found_again(model_path, tmp_path):
    words = ("record", "--engine", "bitnet_py", "--tokens", "5,6,7", "--decode", "1", "--out", tmp_path / "t")
    assert run(*words, "--model", model_path).exit_code == 0
    assert json.loads((tmp_path / "t" / "trace.json").read_text())["prompt"]["token_ids"] == [5, 6, 7]
    rerun = ("layers", "--model", model_path, "--reference", tmp_path / "t", "--tokens")
    assert run(*rerun, "5,6,7").exit_code == 0
    assert "5, 6, 8" in error_line(run(*rerun, "5,6,8"))


# --- stdin and stdout -------------------------------------------------------------------------------------------


@pytest.fixture
def made(model_path, golden, out):
    """Return a receipt's file and its text."""
    words = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--full", "--receipt", out)
    assert run("layers", *words).exit_code == 0
    return out, out.read_text()


def test_receipts_come_from_stdin(made):
    path, text = made
    assert given(text, "gate", "-").stdout == given("", "gate", path).stdout.replace(str(path), "-")
    assert given(text, "show", "-").stdout == run("show", path).stdout
    assert run("show", path).exit_code == 0
    assert "1 receipts" in given(text, "history", "-").stdout
    assert given(text[:-40], "gate", "-").exit_code == 4


def test_what_comes_from_stdin_is_limited_too(made, monkeypatch):
    _, text = made
    monkeypatch.setattr(receipt, "MAX_SIZE_BYTES", len(text.encode()))
    assert given(text, "gate", "-").exit_code == 0
    assert "larger than" in error_line(given(text + " ", "gate", "-"))
    result = given("x" * ((1 << 20) + 1), "triage", "--prompt", "p", "--output", "-")
    assert (result.exit_code, "larger than" in error_line(result)) == (4, True)


def test_a_receipt_goes_to_stdout_and_the_tables_to_stderr(model_path, golden, made):
    words = ("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden)
    result = run(*words, "--receipt", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdict"] == "parity"
    assert "PARITY" in result.stderr
    assert given(result.stdout, "gate", "-").exit_code == 0
    both = run(*words, "--receipt", "-", "--json")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--json and --receipt - both write to stdout" in both.stderr


def test_prompts_and_texts_come_from_stdin(model_path):
    words = (
        "greedy",
        "--prompts",
        "-",
        "--steps",
        "1",
        "--reference",
        "bitnet_py",
        "--model",
        model_path,
        "--no-audit",
    )
    assert '"text": "one"' in given("one\ntwo\n", *words, "--json").stdout
    assert "looks" in given("the the the the", "triage", "--prompt", "p", "--output", "-").stdout


def test_what_the_gate_writes_goes_to_stdout(made):
    path, _ = made
    result = run("gate", path, "--markdown", "-")
    assert result.stdout.startswith("### crossval gate: 1 of 1 receipts pass")
    assert "PASS" in result.stderr
    assert run("gate", path, "--markdown", "-", "--json").exit_code == 2


# --- color and detail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "colored"),
    [
        ((), {}, False),
        (("--color",), {}, True),
        (("--color",), {"NO_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (("--no-color",), {"FORCE_COLOR": "1"}, False),
        ((), {"NO_COLOR": "", "FORCE_COLOR": ""}, False),
    ],
)
def test_color(words, environment, colored, made, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in run("show", made[0], *words).stdout) is colored


def test_quiet_is_the_verdict_alone_and_verbose_every_row(made, monkeypatch):
    path, _ = made
    normal, quiet, verbose = (run("show", path, *words).stdout for words in ((), ("-q",), ("-v",)))
    assert quiet == next(line for line in normal.splitlines(keepends=True) if line.startswith("PARITY"))
    assert len(verbose.splitlines()) > len(normal.splitlines())
    assert run("gate", path, "--quiet").stdout == f"PASS  {path}\n"
    assert "exclude each other" in run("show", path, "-q", "-v").stderr


def test_progress_is_a_line_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(output, "EVERY_S", 10.0)
    seconds, lines = iter([0.0, 9.9, 10.0, 19.0, 20.5, 21.0]), []
    report = output.Lines(lines.append, lambda: next(seconds))
    for done in range(5):
        report("audit\x1b", done, 5)
    assert lines == ["audit\\x1b: 1 of 5, 10 s", "audit\\x1b: 3 of 5, 20 s"]


@pytest.mark.parametrize(("words", "shown"), [((), True), (("--quiet",), False)])
def test_long_work_says_how_far_it_is_on_stderr(words, shown, model_path, golden, monkeypatch):
    monkeypatch.setattr(output, "EVERY_S", 0.0)
    result = run("layers", "--prompt", PROMPT, "--model", model_path, "--reference", golden, *words)
    assert ("checking the model: 0 of 1, 0 s" in result.stderr) is shown
    assert result.exit_code == 0
    assert bool(result.stderr) is shown


# --- defaults and completion ------------------------------------------------------------------------------------


def test_defaults_come_from_the_environment(model_path, golden, monkeypatch):
    monkeypatch.setenv("CROSSVAL_MODEL", str(model_path))
    monkeypatch.setenv("CROSSVAL_REFERENCE", str(golden))
    monkeypatch.setenv("CROSSVAL_CANDIDATE", "spec")
    monkeypatch.setenv("CROSSVAL_THREADS", "1")
    made = json.loads(run("layers", "--prompt", PROMPT, "--json").stdout)
    assert made["settings"]["candidate"] == "spec"
    assert made["settings"]["reference"] == golden.name
    assert made["settings"]["n_threads"] == 1
    assert made["model"]["file_name"] == model_path.name
    told = json.loads(run("layers", "--prompt", PROMPT, "--json", "--candidate", "bitnet_py").stdout)
    assert told["settings"]["candidate"] == "bitnet_py"
    text = " ".join(run("layers", "--help").stdout.split())
    for name in ("MODEL", "REFERENCE", "CANDIDATE", "THREADS"):
        assert f"env var: CROSSVAL_{name}" in text


def completed(*words):
    *before, last = words
    complete = ShellComplete(cli, {}, "crossval", "_CROSSVAL_COMPLETE")
    return [(one.type, one.value) for one in complete.get_completions(before, last)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("layers", "--reference", "bit"), [("plain", "bitnet_py"), ("plain", "bitnet.cpp")]),
        (("layers", "--reference", "au"), [("plain", "auto")]),
        (("layers", "--candidate", "au"), [("dir", "au")]),
        (("layers", "--candidate", "tra"), [("plain", "transformers")]),
        (("layers", "--candidate", "bitnet.cpp:"), [("file", "bitnet.cpp:")]),
        (("record", "--engine", "sp"), [("plain", "spec")]),
        (("smoke", "--suite", ""), [("plain", "fixed"), ("plain", "long"), ("plain", "everyday")]),
        (("smoke", "--suite", "my"), [("file", "my")]),
        (("gate", "re"), [("file", "re")]),
        (("tokens", "--reference", "tik"), [("plain", "tiktoken")]),
        (("lay",), [("plain", "layers")]),
    ],
    ids=lambda value: str(value[-2:]),
)
def test_the_shell_completes(words, found):
    assert completed(*words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_clicks(shell, monkeypatch):
    monkeypatch.setenv("_CROSSVAL_COMPLETE", f"{shell}_source")
    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit) as end:
        cli.main([], prog_name="crossval")
    assert end.value.code == 0
    assert b"_CROSSVAL_COMPLETE" in stream.buffer.getvalue()
