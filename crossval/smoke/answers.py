"""An engine's answers to a suite, and the pure functions from answers to classes, counts and a verdict.

``correct``: the whole text is the expected answer, or the expected pattern is found in a well-formed text.
``coherent``: wrong, but well-formed: ordinary text that ends by itself. ``garbled``: everything else;
``why_garbled`` states why. Only the form is judged: nonsense can be "coherent".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from crossval.smoke import patterns
from crossval.smoke.suite import SmokePrompt
from crossval.terms import PassFail, Side

Finish = Literal["stop", "newline", "limit", "context", "invalid"]
AnswerClass = Literal["correct", "coherent", "garbled"]

MAX_REPEATS = 3
"""How many times in a row the same token may occur."""
WINDOW_TOKENS = 24
"""Loops are looked for in the last tokens of an answer,"""
MIN_WINDOW_TOKENS = 8
"""in answers that are at least this long,"""
MIN_DISTINCT_SHARE = (1, 3)
"""of which at least this fraction must be distinct tokens."""


@dataclass(frozen=True)
class MinCorrect:
    """Minimum fraction of correct answers, ``correct`` out of ``of``."""

    correct: int = 7
    of: int = 10

    def is_met(self, correct: int, n_prompts: int) -> bool:
        """Return whether the fraction is reached; without any prompts it never is."""
        return n_prompts > 0 and correct * self.of >= self.correct * n_prompts

    def __str__(self) -> str:
        return f"{self.correct}/{self.of}"


@dataclass(frozen=True)
class Answer:
    """What one engine generated for one prompt; ``token_ids`` includes the token that ended it."""

    prompt: SmokePrompt
    side: Side
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish: Finish
    """``stop``: end-of-text token; ``newline``: the suite ends answers there; ``limit``: the maximum of tokens;
    ``context``: the model's context is full; ``invalid``: logits missing, NaN or infinite."""
    text: str
    """Decoded, special tokens spelt out, without the token that ended it; up to the newline if that ended it."""

    @property
    def body(self) -> tuple[int, ...]:
        """Return the generated tokens without the end-of-text token."""
        return self.token_ids[:-1] if self.finish == "stop" else self.token_ids


Classified = tuple[Answer, AnswerClass]


@dataclass(frozen=True)
class SmokeResult:
    """All answers of one run, prompt by prompt, within a prompt in the order of ``sides``."""

    suite: str
    suite_digest: str
    n_prompts: int
    sides: tuple[Side, ...]
    answers: tuple[Answer, ...]
    min_correct: MinCorrect
    stop_ids: tuple[int, ...]
    """The vocabulary's end-of-text tokens, ascending."""
    special_ids: tuple[int, ...]
    """Tokens that are not text: control, unknown, unused; ascending."""

    @cached_property
    def classified(self) -> tuple[Classified, ...]:
        """Each answer with its class.

        Raises:
            BadInputError: a pattern is unusable or takes too long.
        """
        return tuple(zip(self.answers, classify(self.answers, self.special_ids), strict=True))


def classify(answers: Sequence[Answer], special_ids: Collection[int]) -> list[AnswerClass]:
    """Return the class of each answer.

    Raises:
        BadInputError: a pattern is unusable or takes too long.
    """
    special = frozenset(special_ids)
    pairs = {_pair(answer) for answer in answers if answer.prompt.pattern is not None}
    found = patterns.search(pairs)
    return [_class(answer, special, found.get(_pair(answer), False)) for answer in answers]


def _pair(answer: Answer) -> tuple[str, str]:
    return answer.prompt.pattern or "", answer.text.strip()


def _class(answer: Answer, special: frozenset[int], pattern_found: bool) -> AnswerClass:
    expected = answer.prompt.answer
    if expected is not None and answer.finish != "invalid" and answer.text.strip() == expected.strip():
        return "correct"
    if why_garbled(answer, special) is not None:
        return "garbled"
    return "correct" if answer.prompt.pattern is not None and pattern_found else "coherent"


def why_garbled(answer: Answer, special_ids: Collection[int]) -> str | None:
    """Return the first reason why an answer is not ordinary text, or None.

    An answer that has to match as a whole must end by itself; one that is searched for a pattern may be a long
    sentence, cut off at the limit.
    """
    body, text = answer.body, answer.text
    if answer.finish == "invalid":
        return "the logits are missing or not finite"
    if not text.strip():
        return "no text"
    odd = next((char for char in text if char == "\ufffd" or not (char.isprintable() or char in "\n\t")), None)
    if odd is not None:
        return f"unreadable character U+{ord(odd):04X}"
    special = next((token for token in body if token in special_ids), None)
    if special is not None:
        return f"special token {special} inside the text"
    n_times, repeated = max(((len(list(run)), token) for token, run in groupby(body)), default=(0, 0))
    if n_times > MAX_REPEATS:
        return f"token {repeated} stands {n_times} times in a row"
    window = body[-WINDOW_TOKENS:]
    n_distinct = len(set(window))
    if (
        len(window) >= MIN_WINDOW_TOKENS
        and n_distinct * MIN_DISTINCT_SHARE[1] < len(window) * MIN_DISTINCT_SHARE[0]
    ):
        return f"a loop: the last {len(window)} tokens are only {n_distinct} different ones"
    if answer.prompt.answer is not None and answer.finish in ("limit", "context"):
        return f"no end within {len(body)} tokens"
    return None


def thresholds(min_correct: MinCorrect) -> dict[str, Any]:
    """Return the criteria for answers, as plain JSON values for the receipt."""
    return {
        "min_correct": {"correct": min_correct.correct, "of": min_correct.of},
        "max_repeats": MAX_REPEATS,
        "window_tokens": WINDOW_TOKENS,
        "min_window_tokens": MIN_WINDOW_TOKENS,
        "min_distinct_share": {"distinct": MIN_DISTINCT_SHARE[0], "of": MIN_DISTINCT_SHARE[1]},
    }


def decide(result: SmokeResult) -> PassFail:
    """Return ``pass`` when every engine answered every prompt and enough of them correctly."""
    if not result.n_prompts or not result.sides or len(result.answers) != result.n_prompts * len(result.sides):
        return "incomplete"
    n_correct = [
        sum(kind == "correct" for answer, kind in result.classified if answer.side == side)
        for side in result.sides
    ]
    return "pass" if all(result.min_correct.is_met(n, result.n_prompts) for n in n_correct) else "fail"


def count(result: SmokeResult) -> dict[str, Any]:
    """Return the receipt's ``results.summary``: counts per engine and family, and how many texts are equal."""
    pairs = result.classified
    return {
        "engines": [_engine_counts(side, [p for p in pairs if p[0].side == side]) for side in result.sides],
        "texts": _texts(result.answers) if len(result.sides) == 2 else None,
    }


def _engine_counts(side: Side, pairs: list[Classified]) -> dict[str, Any]:
    families = list(dict.fromkeys(answer.prompt.family for answer, _ in pairs))
    grouped = {name: [pair for pair in pairs if pair[0].prompt.family == name] for name in families}
    by_family = [{"family": name, **_split(group)} for name, group in grouped.items()]
    return {"engine": side, **_split(pairs), "families": by_family}


def _split(pairs: list[Classified]) -> dict[str, Any]:
    return {
        "all": _counts(pairs),
        "seen": _counts([pair for pair in pairs if pair[0].prompt.seen is True]),
        "unseen": _counts([pair for pair in pairs if pair[0].prompt.seen is False]),
    }


def _counts(pairs: list[Classified]) -> dict[str, int]:
    kinds = [kind for _, kind in pairs]
    return {"n_prompts": len(kinds), **{kind: kinds.count(kind) for kind in ("correct", "coherent", "garbled")}}


def _texts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many prompts both engines answered with the same text, and the first where they differ."""
    given: dict[str, list[str]] = {}
    for answer in answers:
        given.setdefault(answer.prompt.id, []).append(answer.text)
    unequal = [name for name, texts in given.items() if len(texts) != 2 or texts[0] != texts[1]]
    return {
        "compared": len(given),
        "equal": len(given) - len(unequal),
        "first_unequal": unequal[0] if unequal else None,
    }
