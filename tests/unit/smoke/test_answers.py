from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from crossval.smoke import answers
from crossval.smoke.answers import Answer, AnswerClass, MinCorrect
from crossval.smoke.suite import SmokePrompt
from tests.support import receipt_samples as samples

EXACT = SmokePrompt("x", "sum", None, "What is 2+2?", answer="4.")
PATTERN = SmokePrompt("p", "sum", None, "What is 2+2?", pattern=r"\b(4|four)\b")
EOS, SPECIAL = 299, 250


def answer(text: str, prompt: SmokePrompt = EXACT, **changes: Any) -> Answer:
    base: dict[str, Any] = {"side": "candidate", "prompt_ids": (1,), "token_ids": (5, 6, EOS), "finish": "stop"}
    return Answer(**{**base, "prompt": prompt, "text": text, **changes})


def kind(*args: Any, **changes: Any) -> AnswerClass:
    return answers.classify([answer(*args, **changes)], (SPECIAL, EOS))[0]


@pytest.mark.parametrize("text", ["4.", " 4.", "\n4. "])
def test_the_expected_text_is_correct_but_for_white_space_around_it(text: str) -> None:
    assert kind(text) == "correct"


@pytest.mark.parametrize("text", ["5.", "4", "4. 4.", "Four.", "4.!", "It is 4."])
def test_another_text_that_ends_by_itself_is_coherent(text: str) -> None:
    assert kind(text) == "coherent"
    assert kind(text, finish="newline", token_ids=(5, 6)) == "coherent"


@pytest.mark.parametrize(("text", "expected"), [("2+2 is four.", "correct"), ("It is 14.", "coherent")])
def test_a_pattern_is_searched_for(text: str, expected: str) -> None:
    assert kind(text, PATTERN) == expected


GARBLED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"text": " \n"}, "no text"),
    "broken utf-8": ({"text": "4\ufffd"}, r"U\+FFFD"),
    "control character": ({"text": "4\x07"}, r"U\+0007"),
    "private use": ({"text": "4\ue000"}, r"U\+E000"),
    "special token inside": ({"token_ids": (5, SPECIAL, 6, EOS)}, "special token 250"),
    "the same token": ({"token_ids": (5, 6, 6, 6, 6, EOS)}, "token 6 stands 4 times in a row"),
    "a loop": ({"token_ids": (5, 6) * 4 + (EOS,)}, "only 2 different"),
    "a loop at the end": (
        {"token_ids": (*range(20, 40), *(5, 6, 7) * 8, EOS)},
        "last 24 tokens are only 3 different",
    ),
    "logits": ({"token_ids": (5,), "finish": "invalid"}, "not finite"),
}


@pytest.mark.parametrize("name", GARBLED)
def test_what_is_no_ordinary_text_is_garbled(name: str) -> None:
    changes, why = GARBLED[name]
    for prompt in (EXACT, PATTERN):
        made = answer(**{"text": "four 4", "prompt": prompt, **changes})
        assert answers.classify([made], (SPECIAL, EOS)) == ["garbled"]
        found = answers.why_garbled(made, (SPECIAL, EOS))
        assert found is not None
        assert re.search(why, found), found


def test_repetition_up_to_the_limit_is_ordinary() -> None:
    assert kind("x", token_ids=(6, 6, 6, 5, EOS)) == "coherent"
    assert kind("x", token_ids=(5, 6, 7) * 2 + (EOS,)) == "coherent"
    assert kind("x", token_ids=(5, 6, 7) * 3 + (EOS,)) == "coherent"


def test_only_a_searched_text_may_be_cut_at_the_limit() -> None:
    ids = tuple(range(24))
    for finish in ("limit", "context"):
        assert kind("It is 4, which", PATTERN, token_ids=ids, finish=finish) == "correct"
        assert kind("It is 5, which", PATTERN, token_ids=ids, finish=finish) == "coherent"
        assert kind("It is 4, which", token_ids=ids, finish=finish) == "garbled"
    assert kind("4.", token_ids=ids, finish="limit") == "correct"
    assert kind("4.", token_ids=(5,), finish="invalid") == "garbled"


def test_a_share_is_reached_exactly_and_never_by_nothing() -> None:
    assert MinCorrect(7, 10).is_met(7, 10)
    assert MinCorrect(7, 10).is_met(350, 500)
    assert not MinCorrect(7, 10).is_met(349, 500)
    assert not MinCorrect(7, 10).is_met(6, 10)
    assert MinCorrect(1, 3).is_met(1, 3)
    assert not MinCorrect(7, 10).is_met(0, 0)


def decide(*wrong: Answer, **changes: Any) -> str:
    result = samples.smoke_result(*wrong, **changes)
    return answers.decide(result)


def test_every_engine_has_to_answer_well_enough() -> None:
    ours = samples.smoke_answer(0, text="5.")
    theirs = [samples.smoke_answer(index, "reference", text="5.") for index in (0, 1)]
    assert decide() == decide(ours) == "pass"
    assert decide(ours, *theirs) == "fail"
    assert decide(ours, *theirs, sides=("candidate",)) == "pass"
    assert decide(ours, min_correct=MinCorrect(4, 5)) == "fail"


def test_a_missing_answer_is_incomplete_and_nothing_is_no_pass() -> None:
    result = samples.smoke_result()
    short = dataclasses.replace(result, answers=result.answers[:-1])
    assert answers.decide(short) == "incomplete"
    empty = dataclasses.replace(result, answers=(), n_prompts=0)
    assert answers.decide(empty) == "incomplete"


def test_counts_by_family_and_by_what_was_seen() -> None:
    result = samples.smoke_result(
        samples.smoke_answer(1, text="12."), samples.smoke_answer(3, "reference", text="", token_ids=(299,))
    )
    summary = answers.count(result)
    ours, theirs = summary["engines"]
    assert ours["all"] == {"n_prompts": 4, "correct": 3, "coherent": 1, "garbled": 0}
    assert ours["seen"] == {"n_prompts": 1, "correct": 1, "coherent": 0, "garbled": 0}
    assert ours["unseen"] == {"n_prompts": 2, "correct": 1, "coherent": 1, "garbled": 0}
    assert [family["family"] for family in ours["families"]] == ["sum", "capital", "opposite"]
    assert ours["families"][0]["all"] == {"n_prompts": 2, "correct": 1, "coherent": 1, "garbled": 0}
    assert ours["families"][0]["seen"]["correct"] == 1
    assert theirs["all"]["garbled"] == 1
    assert summary["texts"] == {"compared": 4, "equal": 2, "first_unequal": "sum-2"}
