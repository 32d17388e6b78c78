from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossval import read_prompts
from crossval.errors import BadInputError
from crossval.smoke import suite
from crossval.smoke.suite import SmokePrompt

GOOD = {"id": "a", "family": "sum", "seen": True, "prompt": "What is 2+2?", "answer": "4."}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    other = {"id": "b", "prompt": "Capital?", "pattern": "Paris", "stop": "newline", "seen": None}
    found = suite.read_suite(write(tmp_path / "q.jsonl", GOOD, "", other))
    assert found.name == "q.jsonl"
    assert found.prompts == (
        SmokePrompt("a", "sum", True, "What is 2+2?", answer="4."),
        SmokePrompt("b", "all", None, "Capital?", pattern="Paris", stop="newline"),
    )


def test_a_prompt_without_id_is_called_by_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", "", {"prompt": "x", "answer": "y"}, {"prompt": "x", "answer": "z"})
    assert [prompt.id for prompt in suite.read_suite(file).prompts] == ["2", "3"]


def test_the_greedy_command_reads_suites_too(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "id": "b", "prompt": "Why?"})
    assert read_prompts(file) == ["What is 2+2?", "Why?"]


BROKEN: dict[str, tuple[Any, str]] = {
    "not json": ("{", "not valid JSON"),
    "a text": ('"What?"', "expected an object"),
    "a list": ("[]", "a list"),
    "duplicate key": ('{"prompt": "x", "prompt": "y", "answer": "z"}', "duplicate key"),
    "unknown field": ({**GOOD, "anwser": "5"}, "unknown field 'anwser'"),
    "no prompt": ({"answer": "4"}, "prompt: expected a text, got nothing"),
    "empty prompt": ({**GOOD, "prompt": ""}, "an empty text"),
    "prompt of another type": ({**GOOD, "prompt": 4}, "got a number"),
    "lone surrogate": ('{"prompt": "\\ud800", "answer": "x"}', "not valid Unicode"),
    "seen is no boolean": ({**GOOD, "seen": "yes"}, "expected true, false or null"),
    "id is a number": ({**GOOD, "id": 3}, "id: expected a text"),
    "long id": ({**GOOD, "id": "x" * 301}, "at most 300"),
    "unknown stop": ({**GOOD, "stop": "."}, '"eos" or "newline"'),
    "nothing expected": ({"prompt": "x"}, "either an answer or a pattern"),
    "both expected": ({**GOOD, "pattern": "4"}, "either an answer or a pattern"),
    "blank answer": ({**GOOD, "answer": " \n"}, "answer is only whitespace"),
    "not a regular expression": ({"prompt": "x", "pattern": "("}, "not a regular expression"),
    "pattern that cannot fail": ({"prompt": "x", "pattern": ".*"}, "any answer would be correct"),
    "long pattern": ({"prompt": "x", "pattern": "x" * 1001}, "at most 1000"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_one_clear_error_with_its_place(name: str, tmp_path: Path) -> None:
    line, message = BROKEN[name]
    with pytest.raises(BadInputError, match=r"q\.jsonl:2: ") as caught:
        suite.read_suite(write(tmp_path / "q.jsonl", {**GOOD, "id": "first"}, line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"q.jsonl:3: id 'a' is already used in line 1"):
        suite.read_suite(write(tmp_path / "q.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD))


def test_no_prompt_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="has no prompts"):
        suite.read_suite(write(tmp_path / "q.jsonl", "", "  "))


def test_what_is_no_suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="neither fixed, long, everyday nor a file"):
        suite.load_suite("nowhere")
    with pytest.raises(BadInputError, match="not a regular file"):
        suite.load_suite(str(tmp_path))
    (tmp_path / "q.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(BadInputError, match="not UTF-8 at byte 12"):
        suite.load_suite(str(tmp_path / "q.jsonl"))
    file = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "id": "b"})
    monkeypatch.setattr(suite, "MAX_PROMPTS", 1)
    with pytest.raises(BadInputError, match="2 prompts, at most 1"):
        suite.load_suite(str(file))
    monkeypatch.setattr(suite, "MAX_SIZE_BYTES", 10)
    with pytest.raises(BadInputError, match="larger than 10 bytes"):
        suite.load_suite(str(file))
    monkeypatch.setattr(suite, "DATA_DIR", tmp_path)
    with pytest.raises(BadInputError, match="the installation is broken"):
        suite.load_suite("fixed")


@pytest.mark.parametrize(("word", "n_prompts"), [("fixed", 10), ("long", 500), ("everyday", 20)])
def test_the_shipped_suites(word: str, n_prompts: int) -> None:
    found = suite.load_suite(word)
    assert found.name == word
    assert len(found.prompts) >= n_prompts
    assert word == "everyday" or len(found.prompts) == n_prompts
    texts = [prompt.prompt for prompt in found.prompts]
    assert len(set(texts)) == len(texts)


def test_the_digest_is_of_the_prompts_not_of_the_file(tmp_path: Path) -> None:
    one = suite.read_suite(write(tmp_path / "a.jsonl", GOOD))
    other = suite.read_suite(
        write(tmp_path / "b.jsonl", "", json.dumps(dict(reversed(GOOD.items())), indent=None))
    )
    assert one.digest == other.digest
    changed = suite.read_suite(write(tmp_path / "c.jsonl", {**GOOD, "answer": "5."}))
    assert one.digest != changed.digest


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(names, names, st.sampled_from([True, False, None])), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, items: list[Any]) -> None:
    file = tmp_path_factory.mktemp("suite") / "q.jsonl"
    lines = [
        {"id": str(index), "family": family, "seen": seen, "prompt": prompt, "answer": f"{prompt}."}
        for index, (family, prompt, seen) in enumerate(items)
    ]
    file.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8", newline=""
    )
    found = [(prompt.family, prompt.prompt, prompt.seen) for prompt in suite.read_suite(file).prompts]
    assert found == items
