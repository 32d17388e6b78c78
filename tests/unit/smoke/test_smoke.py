from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from crossval.cli import cli
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.errors import BadInputError, EngineCrashError, UnavailableError
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray
from crossval.receipts import file as receipt
from crossval.smoke import ask as smoke
from crossval.smoke.answers import Answer
from crossval.smoke.ask import Decoder, Limits
from crossval.smoke.suite import SmokePrompt, Suite
from tests.support import vocabularies

PROMPT = "What is 2+2?"


class ScriptedRunner:
    """An engine that generates given token ids, one list per prompt, NaN for None."""

    status = "live"

    def __init__(self, decoder: Decoder, scripts: dict[str, list[int | None]], n_ctx: int | None = None) -> None:
        self.decoder = decoder
        self.scripts = {tuple(self.tokenize(text)): script for text, script in scripts.items()}
        self.identity = EngineIdentity("scripted", settings={} if n_ctx is None else {"n_ctx": n_ctx})
        self.plan: tuple[PassPlan, ...] | None = None
        self.fed: list[int] = []
        self.passes: list[int] = []

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        return self.decoder.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        self.fed = []

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        assert set(select) == {"result_output"}
        plan = PassPlan("decode" if self.fed else "prefill", tuple(token_ids), len(self.fed))
        self.passes.append(len(token_ids))
        self.fed += token_ids
        prompt = next(ids for ids in self.scripts if tuple(self.fed[: len(ids)]) == ids)
        written = self.fed[len(prompt) :]
        script = self.scripts[prompt]
        assert written == script[: len(written)], "an engine is fed its own choices, one by one"
        token = script[len(written)]
        logits = np.zeros((1, self.decoder.tokenizer.vocab_size), np.float32)
        if token is None:
            logits[:] = np.nan
        else:
            logits[0, token] = 1
        return PassRecord(plan, {"result_output": TapArray(logits, (len(token_ids) - 1,))})


@pytest.fixture(scope="session")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def decoder(model_path: Path) -> Decoder:
    return Decoder.of_model(model_path, "march")


@pytest.fixture(scope="module")
def eos(decoder: Decoder) -> int:
    return min(decoder.stop_ids)


def ask(
    decoder: Decoder, script: list[int | None], *, stop: Any = "eos", max_tokens: int = 8, room: int = 100
) -> Answer:
    suite = Suite("s", (SmokePrompt("a", "f", None, PROMPT, answer="x", stop=stop),))
    runner: Any = ScriptedRunner(decoder, {PROMPT: script})
    return smoke.answer_suite(runner, "candidate", suite, decoder, Limits(max_tokens, room))[0]


def ids(decoder: Decoder, text: str) -> list[int | None]:
    return list(decoder.tokenizer.encode(text, add_bos=False))


@pytest.mark.parametrize(("rules", "ends"), [("march", {1}), ("main", {1, 2})])
def test_what_ends_generation_depends_on_the_rules(tmp_path: Path, rules: Any, ends: set[int]) -> None:
    tokens = {"tokens": ["a", "<|endoftext|>", "<|end_of_text|>", "b", "ab"], "token_type": [1, 3, 1, 1, 1]}
    tokens["merges"] = ["a b"]
    path = vocabularies.write(tmp_path / "v.gguf", "gpt-2", **tokens, bos_token_id=1, eos_token_id=1)
    assert Decoder.of_model(path, rules).stop_ids == ends


# The token loop


def test_generation_ends_at_an_end_of_text_token(decoder: Decoder, eos: int) -> None:
    found = ask(decoder, [*ids(decoder, "4."), eos])
    assert (found.text, found.finish, found.token_ids[-1]) == ("4.", "stop", eos)
    assert found.body == found.token_ids[:-1]
    assert list(found.prompt_ids) == decoder.tokenizer.encode(PROMPT)


def test_the_prompt_is_one_pass_and_every_token_another(decoder: Decoder, eos: int) -> None:
    runner: Any = ScriptedRunner(decoder, {PROMPT: [*ids(decoder, "4."), eos], "Why?": [eos]})
    suite = Suite("s", tuple(SmokePrompt(text, "f", None, text, answer="x") for text in (PROMPT, "Why?", PROMPT)))
    seen: list[tuple[str, int, int]] = []
    found = smoke.answer_suite(
        runner, "reference", suite, decoder, Limits(8, 100), progress=lambda *step: seen.append(step)
    )
    n_prompt, n_answer = len(found[0].prompt_ids), len(found[0].body)
    assert runner.passes == [n_prompt, *[1] * n_answer, len(found[1].prompt_ids), n_prompt, *[1] * n_answer]
    assert found[0] == Answer(**{**vars(found[2]), "prompt": found[0].prompt})
    assert seen == [("reference scripted", done, 3) for done in range(4)]


def test_generation_ends_at_the_limit(decoder: Decoder) -> None:
    found = ask(decoder, [65] * 20, max_tokens=5)
    assert (found.finish, found.token_ids) == ("limit", (65,) * 5)


def test_generation_ends_when_the_context_is_full(decoder: Decoder) -> None:
    n_prompt = len(decoder.tokenizer.encode(PROMPT))
    found = ask(decoder, [65] * 20, max_tokens=20, room=n_prompt + 2)
    assert (found.finish, len(found.token_ids)) == ("context", 3)  # the last one needs no room: it is not fed
    runner: Any = ScriptedRunner(decoder, {PROMPT: [65] * 20}, n_ctx=n_prompt)
    suite = Suite("s", (SmokePrompt("a", "f", None, PROMPT, answer="x"),))
    found = smoke.answer_suite(runner, "candidate", suite, decoder, Limits(20, 10_000))[0]
    assert (found.finish, len(found.token_ids)) == ("context", 1)


def test_a_suite_may_end_answers_at_a_line_feed(decoder: Decoder, eos: int) -> None:
    script = [*ids(decoder, "\n 4.\nQ: What"), eos]
    found = ask(decoder, script, stop="newline", max_tokens=30)
    assert (found.text, found.finish) == ("\n 4.", "newline")
    found = ask(decoder, script, max_tokens=30)
    assert (found.text, found.finish) == ("\n 4.\nQ: What", "stop")


def test_special_tokens_and_broken_bytes_are_visible(decoder: Decoder, eos: int) -> None:
    special = min(decoder.special_ids - decoder.stop_ids)
    found = ask(decoder, [*ids(decoder, "4"), special, eos])
    assert found.text == "4" + decoder.tokenizer.vocabulary.tokens[special]
    byte = ids(decoder, "é")[0]
    assert ask(decoder, [byte, eos]).text == "\ufffd"


def test_logits_that_are_not_finite_end_the_answer(decoder: Decoder) -> None:
    found = ask(decoder, [*ids(decoder, "4"), None])
    assert (found.text, found.finish) == ("4", "invalid")


def test_a_trace_cannot_answer(decoder: Decoder) -> None:
    runner: Any = ScriptedRunner(decoder, {})
    runner.plan = (PassPlan("prefill", (1,), 0),)
    for side, remedy in (("candidate", "--candidate bitnet_py"), ("reference", "make fetch-cpp")):
        with pytest.raises(UnavailableError, match=f"the {side} is a recorded trace.*{remedy}"):
            smoke.answer_suite(runner, side, Suite("s", ()), decoder, Limits(8, 100))  # type: ignore[arg-type]


def test_a_prompt_that_does_not_fit_is_named(decoder: Decoder) -> None:
    with pytest.raises(BadInputError, match=r"suite s, prompt 'a': the prompt has \d+ tokens, .* holds 3"):
        ask(decoder, [65], room=3)


# The command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="crossval")


def error_line(result: Result) -> str:
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


PROMPTS = ("What is 2+2?", "Hello", "Why?")


def write_suite(path: Path, answers: Sequence[str]) -> Path:
    lines = [
        {"id": f"q{index}", "family": "odd" if index % 2 else "even", "prompt": prompt, "answer": answer}
        for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def texts(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the untrained tiny model generates: the only answers it can be expected to give."""
    file = write_suite(tmp_path_factory.mktemp("suite") / "q.jsonl", ["?"] * 3)
    result = run("smoke", "--suite", file, "--model", model_path, "--max-tokens", "6", "--json")
    assert result.exit_code == 1, result.output
    return [row["text"] for row in json.loads(result.stdout)["results"]["rows"]]


@pytest.fixture
def common(model_path: Path) -> tuple[str | Path, ...]:
    return ("--model", model_path, "--max-tokens", "6")


def test_right_answers_pass_and_the_gate_agrees(texts: list[str], common: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    suite = write_suite(tmp_path / "q.jsonl", [*texts[:2], "something else"])
    result = run("smoke", "--suite", suite, *common, "--min-correct", "2/3", "--receipt", out)
    assert result.exit_code == 0, result.output
    assert "PASS  candidate bitnet_py: 2 of 3 correct (2/3 required)" in result.stdout
    assert "wrong: q2: 'Why?' -> " in result.stdout
    assert "wrong: q0" not in result.stdout
    assert str(out) in result.stdout
    assert "reference" not in result.stdout
    made = receipt.read(out)
    assert (made["kind"], made["verdict"], made["reference"]["status"]) == ("smoke", "pass", "unused")
    assert made["settings"]["n_steps"] == 6
    assert [row["class"] for row in made["results"]["rows"]][:2] == ["correct"] * 2
    # What the command was content with is not what the gate is content with.
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--min-correct", "0.6").exit_code == 0


def test_wrong_answers_fail(texts: list[str], common: Any, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "q.jsonl", [texts[0], "x", "y"])
    for share, code in (("7/10", 1), ("1/3", 0), (".34", 1), ("0.33", 0), ("1", 1)):
        assert run("smoke", "--suite", suite, *common, "--min-correct", share).exit_code == code, share


def test_json_mode_prints_the_receipt_and_nothing_else(common: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    result = run("smoke", "--suite", suite, *common, "--json", "--receipt", out)
    assert result.exit_code == 1
    assert json.loads(result.stdout) == receipt.read(out)
    assert result.stderr == ""


def test_both_engines(texts: list[str], common: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    suite = write_suite(tmp_path / "q.jsonl", texts)
    args = ("smoke", "--suite", suite, *common, "--engine", "both", "--reference", "spec", "--receipt", out)
    result = run(*args)
    made = receipt.read(out)
    sides = [(row["id"], row["engine"]) for row in made["results"]["rows"]]
    assert sides == [(f"q{index}", side) for index in range(3) for side in ("candidate", "reference")]
    counts = made["results"]["summary"]
    assert counts["engines"][0]["all"]["correct"] == 3
    assert counts["engines"][1]["all"]["correct"] == counts["texts"]["equal"]
    assert made["parity"]["exact_match_rate"] == counts["texts"]["equal"] / 3
    assert made["tokenizer"]["engines_agree"] is True
    assert f"texts equal: {counts['texts']['equal']} of 3" in result.stdout
    assert result.exit_code == (0 if counts["texts"]["equal"] == 3 else 1)
    accept = ("--reference-name", "specification", "--min-correct", "0.1")
    assert run("gate", out, *accept, "--min-exact-match", "1").exit_code == (
        0 if made["verdict"] == "pass" and counts["texts"]["equal"] == 3 else 1
    )


def test_the_reference_alone(texts: list[str], common: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    suite = write_suite(tmp_path / "q.jsonl", texts)
    result = run(
        "smoke", "--suite", suite, *common, "--engine", "reference", "--reference", "spec", "--receipt", out,
        "--min-correct", "1/3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert (made["candidate"]["status"], made["compute"]["path"]) == ("unused", "none")
    policy = ("--reference-name", "specification", "--min-correct", "0.3")
    assert run("gate", out, *policy).exit_code == 1
    assert run("gate", out, *policy, "--allow-compute", "none").exit_code == 0


def test_tokenizers_that_disagree_are_noted(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BitnetPyRunner.tokenize
    monkeypatch.setattr(BitnetPyRunner, "tokenize", lambda self, text, **options: honest(self, text)[::-1])
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    args = ("smoke", "--suite", suite, *common, "--engine", "both", "--reference", "spec", "--json")
    made = json.loads(run(*args).stdout)
    assert made["tokenizer"]["engines_agree"] is False
    assert any("disagree, first on prompt 'q0'" in note for note in made["notes"])


def test_a_pattern_that_hangs_is_bad_input(tmp_path: Path, common: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossval.smoke.patterns.TIMEOUT_S", 0.5)
    suite = tmp_path / "q.jsonl"
    suite.write_text(json.dumps({"prompt": "x", "pattern": "(?:|||){40}(?!)"}))
    result = run("smoke", "--suite", suite, *common)
    assert result.exit_code == 4
    assert "no answer within" in error_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--min-correct", "0/10"),
        ("--min-correct", "0"),
        ("--min-correct", "11/10"),
        ("--min-correct", "1.1"),
        ("--min-correct", "7/0"),
        ("--min-correct", "nan"),
        ("--min-correct", ""),
        ("--max-tokens", "0"),
        ("--engine", "all"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run("smoke", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_no_suite_and_no_prompt_are_bad_input(tmp_path: Path) -> None:
    result = run("smoke", "--suite", tmp_path / "none.jsonl")
    assert result.exit_code == 4
    assert "neither fixed, long, everyday nor a file" in error_line(result)
    (tmp_path / "empty.jsonl").write_text("\n")
    result = run("smoke", "--suite", tmp_path / "empty.jsonl")
    assert result.exit_code == 4
    assert "has no prompts" in error_line(result)


@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
@pytest.mark.parametrize("engine", ["reference", "both"])
def test_without_bitnet_cpp_a_recorded_reference_is_no_help(
    word: str, engine: str, common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", lambda: None)
    out = tmp_path / "r.json"
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    args = ("smoke", "--suite", suite, *common, "--engine", engine, "--reference", word)
    result = run(*args)
    assert result.exit_code == 3
    assert "make fetch-cpp" in error_line(result)
    result = run(*args, "--json", "--receipt", out)
    assert result.exit_code == 3
    made = json.loads(result.stdout)
    assert made == receipt.read(out)
    assert (made["verdict"], made["reference"]["status"]) == ("incomplete", "unavailable")
    assert run("gate", out).exit_code == 1


@pytest.mark.parametrize(("engine", "side"), [("candidate", "candidate"), ("reference", "reference")])
def test_a_trace_as_engine_is_exit_3(
    engine: str, side: str, common: Any, tmp_path: Path, model_path: Path
) -> None:
    trace, out = tmp_path / "trace", tmp_path / "r.json"
    args = ("--prompt", "Hello", "--model", model_path, "--engine", "bitnet_py", "--decode", "1", "--outline")
    assert run("record", *args, "--out", trace).exit_code == 0
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    result = run("smoke", "--suite", suite, *common, "--engine", engine, f"--{side}", trace, "--receipt", out)
    assert result.exit_code == 3
    assert f"the {side} is a recorded trace" in error_line(result)
    made = receipt.read(out)
    assert (made["verdict"], made[side]["status"]) == ("incomplete", "unavailable")
    assert run("gate", out).exit_code == 1


def test_an_engine_that_crashes_is_exit_5(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise EngineCrashError("bitnet_py was killed")

    monkeypatch.setattr(BitnetPyRunner, "eval", crash)
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    result = run("smoke", "--suite", suite, *common)
    assert result.exit_code == 5


def test_nan_logits_are_garbled_answers(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BitnetPyRunner.eval

    def broken(self: Any, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        made = honest(self, token_ids, select)
        made.taps["result_output"].array[:] = np.nan
        return made

    monkeypatch.setattr(BitnetPyRunner, "eval", broken)
    suite = write_suite(tmp_path / "q.jsonl", ["x", "y", "z"])
    result = run("smoke", "--suite", suite, *common)
    assert result.exit_code == 1
    assert "garbled: the logits are missing or not finite" in result.stdout


def test_the_synthetic_model_says_nothing(make_model: Callable[..., Path]) -> None:
    result = run("smoke", "--model", make_model(), "--max-tokens", "4")
    assert result.exit_code == 1
    assert "0 of 10 correct" in result.stdout


def test_a_small_model_runs_on_one_thread() -> None:
    from crossval.api.single import SMALL_MODEL_BYTES, _own_threads

    assert _own_threads(SimpleNamespace(facts={"size_bytes": SMALL_MODEL_BYTES})) == 1  # type: ignore[arg-type]
    assert _own_threads(SimpleNamespace(facts={"size_bytes": 1 << 30})) is None  # type: ignore[arg-type]


def test_the_suites_are_packaged() -> None:
    code = "from crossval.smoke import suite; print(*(len(suite.load_suite(w).prompts) for w in suite.SHIPPED))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.split()[:2] == ["10", "500"], done.stderr
