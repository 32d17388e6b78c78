"""``crossval triage --output``: a text judged, with exit codes, without an engine and without a cause."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import crossval
from crossval.api.texts import MAX_TEXT_BYTES
from crossval.cli import cli
from crossval.texts import evidence, finding
from crossval.texts.right import right_text
from crossval.texts.signature import Right
from tests.support.strangers import error_line, run

PROMPT = "What is 2+2?"


@pytest.fixture
def triage(tmp_path: Path, shipped_model: Path):
    """Return ``triage(text, *options, with_model=True)``."""

    def call(text: str | bytes, *options: str, with_model: bool = True):
        file = tmp_path / "text.txt"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        model = ("--model", shipped_model) if with_model else ()
        return run("triage", "--prompt", PROMPT, "--output", file, *model, *options)

    return call


CASES = [
    (" 4.", 0, "readable and short", "the same, to its end (3 tokens)"),
    (f"{PROMPT} 4.\n", 0, "readable and short", "the same, to its end"),
    (" 4. 4. 4. 4. 4.", 1, "one piece repeated", "all 3 tokens are right, then it goes on"),
    (" 4", 1, "readable and short", 'then it stops, or was cut; "." is next'),
    (" 5.", 1, "readable and short", 'differs from the first token on: "4" expected, "5." found'),
    (" 4, I think.", 1, "readable and short", 'then token 2 differs: "." expected, ", I think." found'),
    ("GGGGGGGGGG", 1, "one piece repeated", "differs from the first token on"),
    (b"caf\xc3 4.", 1, "broken characters", "differs from the first token on"),
    ("", 1, "empty", "then it stops"),
]


@pytest.mark.parametrize(("text", "code", "form", "compared"), CASES, ids=[repr(case[0])[:16] for case in CASES])
def test_a_text_is_compared_with_the_right_one(triage, text, code, form, compared):
    result = triage(text)
    assert result.exit_code == code, result.output
    assert re.search(rf"^looks +{form}$", result.stdout, re.M)
    assert compared in result.stdout
    assert "PARITY" not in result.stdout


@pytest.mark.parametrize(("text", "code"), [("A fine answer.", 3), ("!!!!!!!!!!", 1), ("", 1), ("ĠA", 1)])
def test_without_a_model_only_what_a_text_looks_like_is_known(triage, text, code):
    result = triage(text, with_model=False)
    assert result.exit_code == code
    assert "with nothing: give the model" in result.stdout
    assert "no cause is established" in result.stdout


def test_suspects_come_with_the_counts_of_the_measured_file(triage):
    made = triage("WhatWhatWhatWhatWhat", "--json")
    assert made.exit_code == 1
    data = json.loads(made.stdout)
    signature = evidence.Signature("one piece repeated", "at once")
    expected = [[one.family, len(one.faults), one.of] for one in evidence.evidence().suspects(signature)]
    assert [[one["class"], len(one["faults"]), one["of"]] for one in data["suspects"]] == expected
    shown = triage("WhatWhatWhatWhatWhat").stdout
    first = data["suspects"][0]
    assert f"1. {first['class']}; {len(first['faults'])} of its {first['of']} faults" in shown
    share = evidence.evidence().share(right_known=True, like=signature)
    assert f"{share} were of a class among the first 3" in shown
    assert 0 < share.found < share.of


def test_a_right_text_has_no_suspects_and_proves_nothing(triage):
    shown = triage(" 4.").stdout
    assert "proves nothing about the engine" in shown
    assert "1. weights" not in shown
    assert json.loads(triage(" 4.", "--json").stdout)["suspects"] == []


def test_a_departure_never_measured_is_ranked_by_its_looks_and_says_so(triage):
    shown = triage(" 4.!!!!!!!!!!!!").stdout
    assert "no fault made an engine print such a text right but not stopping; by its looks alone:" in shown


@pytest.mark.parametrize("text", ["nothing is known", "GGGGGGGG", "ĠA", "<s> 4."])
def test_the_commands_it_prints_have_words_that_exist(text, shipped_model):
    for model in (None, shipped_model):
        found = crossval.explain_text(text, PROMPT, model)
        commands = re.findall(r"crossval \w+ .*$", "\n".join(found.steps()), re.M)
        assert any(command.startswith("crossval layers --prompt 'What is 2+2?'") for command in commands)
        for command in commands:
            _, name, *words = shlex.split(command)
            known = {option for param in cli.commands[name].params for option in param.opts}
            assert {word for word in words if word.startswith("--")} <= known, command


def test_bad_input_is_one_line(triage, tmp_path, shipped_model):
    missing = run("triage", "--prompt", PROMPT, "--output", tmp_path / "nowhere.txt")
    assert missing.exit_code == 4
    assert "nowhere.txt" in error_line(missing)
    no_prompt = run("triage", "--prompt", "", "--output", tmp_path)
    assert no_prompt.exit_code == 4
    no_model = triage("text", "--model", str(tmp_path / "none.gguf"), with_model=False)
    assert no_model.exit_code == 4
    assert "none.gguf" in error_line(no_model)
    large = triage("a" * (MAX_TEXT_BYTES + 1))
    assert large.exit_code == 4
    assert "more than" in error_line(large)


@pytest.mark.parametrize(
    "option", [("--candidate", "spec"), ("--receipt", "r.json"), ("--decode", "2"), ("--floors",)]
)
def test_options_about_engines_are_refused(triage, option):
    result = triage("text", *option)
    assert result.exit_code == 2
    assert f"{option[0]} is about engines" in result.stderr


def test_the_right_text_is_computed_as_far_as_needed(shipped_model):
    assert right_text(shipped_model, PROMPT, " 4.") == Right((b" ", b"4", b"."), ended=True)
    assert right_text(shipped_model, PROMPT, " 4") == Right((b" ", b"4", b"."), ended=False)
    assert right_text(shipped_model, PROMPT, "no").tokens == (b" ", b"4")


def test_a_template_changes_the_right_text(shipped_model, tmp_path):
    plain = crossval.explain_text("x", PROMPT, shipped_model)
    wrapped = crossval.explain_text("x", PROMPT, shipped_model, template="bitnet")
    assert plain.right != wrapped.right
    assert "--template bitnet" in "\n".join(wrapped.steps())


def test_every_class_around_the_engine_is_explained():
    families = {one.family for one in evidence.evidence().faults}
    assert set(finding.AROUND) <= families
