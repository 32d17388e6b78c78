"""The families of questions. Each yields everything that it can ask, in a fixed order, as ``Question``.

A question's ``key`` names what is asked. It ignores order or wording where the family is meant to
generalise over them. The split is made by key, so a held-out sum appears in training neither as a+b
nor as b+a.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bitnet_py.synth_random import Stream
from tools.train import words
from tools.train.words import with_article


@dataclass(frozen=True)
class Question:
    """One question and its only correct answer, which ends with a full stop."""

    family: str
    key: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Family:
    """How to generate a family's questions, and its portion of training and held-out data."""

    name: str
    make: Callable[[int], Iterator[Question]]
    """Called with the corpus seed."""
    weight: float
    """Weight in the training examples, relative to the other families."""
    held_out: float
    """Fraction of the keys that training never sees."""
    claim: str
    """What an unseen question of this family tests."""


def _worded(
    family: str, key: str, wordings: Sequence[str], fill: dict[str, str], answer: str
) -> Iterator[Question]:
    """Yield one fact in several wordings; each wording of the fact has its own key."""
    for index, wording in enumerate(wordings):
        prompt = wording.format(**fill)
        yield Question(family, f"{key}/{index}", prompt[0].upper() + prompt[1:], f"{answer}.")


def _capital(_: int) -> Iterator[Question]:
    for country, city in words.CAPITALS:
        forward = ("What is the capital of {c}?", "Name the capital of {c}.", "The capital of {c} is",
                   "Which city is the capital of {c}?")  # fmt: skip
        yield from _worded("capital", country, forward, {"c": country}, city)


def _country(_: int) -> Iterator[Question]:
    for country, city in words.CAPITALS:
        back = (
            "{c} is the capital of",
            "Which country has the capital {c}?",
            "{c} is the capital of which country?",
        )
        yield from _worded("country", country, back, {"c": city}, country)


def _opposite(_: int) -> Iterator[Question]:
    wordings = ("What is the opposite of {w}?", "The opposite of {w} is", "Name the opposite of {w}.")
    for left, right in words.OPPOSITES:
        yield from _worded("opposite", left, wordings, {"w": left}, right)
        yield from _worded("opposite", right, wordings, {"w": right}, left)


def _calendar(_: int) -> Iterator[Question]:
    for unit, names in (("day", words.DAYS), ("month", words.MONTHS)):
        for i, name in enumerate(names):
            fill = {"n": name, "u": unit}
            after = names[(i + 1) % len(names)]
            before = names[i - 1]
            yield from _worded(
                "calendar", f"{name}+1",
                ("What {u} comes after {n}?", "The {u} after {n} is", "Which {u} follows {n}?"), fill, after,
            )  # fmt: skip
            yield from _worded(
                "calendar", f"{name}-1",
                ("What {u} comes before {n}?", "The {u} before {n} is", "Which {u} is right before {n}?"),
                fill, before,
            )  # fmt: skip


def _common(_: int) -> Iterator[Question]:
    for thing, colour in words.COLOURS:
        wordings = ("What colour is {t}?", "The colour of {t} is", "Name the colour of {t}.")
        yield from _worded("common", f"colour {thing}", wordings, {"t": thing}, colour)
    for animal, sound in words.SOUNDS:
        wordings = ("What sound does {a} make?", "Which sound does {a} make?", "The sound of {a} is")
        yield from _worded("common", f"sound {animal}", wordings, {"a": with_article(animal)}, sound)
    for animal, young in words.YOUNG:
        wordings = ("What is a young {a} called?", "A young {a} is called", "Name a young {a}.")
        yield from _worded("common", f"young {animal}", wordings, {"a": animal}, with_article(young))


def _kind(seed: int) -> Iterator[Question]:
    stream = Stream(seed, "kind")
    for kind, members in words.KINDS:
        others = [other for other, _ in words.KINDS if other != kind]
        for thing in members:
            shown = with_article(thing) if kind in ("animal", "fruit", "tool") else thing
            right = with_article(kind)
            # As many wrong kinds as ways to ask for the correct one, so that neither answer is the safe guess.
            for other in (kind, *_distinct(stream, others, 2)):
                for index, prompt in enumerate(
                    (f"Is {shown} {with_article(other)}?", f"Is {shown} {with_article(other)}, yes or no?")
                ):
                    yield Question("kind", f"{thing}/{other}/{index}", prompt, "Yes." if other == kind else "No.")
            yield from _worded("kind", thing, ("What is {t}?", "What kind of thing is {t}?"), {"t": shown}, right)


def _plural(_: int) -> Iterator[Question]:
    pairs = [(noun, f"{noun}s", noun) for noun in words.REGULAR]
    for noun, plural, key in pairs:
        for prompt in (f"What is the plural of {noun}?", f"One {noun}, two", f"Name the plural of {noun}."):
            yield Question("plural", key, prompt, f"{plural}.")
    for noun, plural in words.IRREGULAR:
        wordings = ("What is the plural of {n}?", "One {n}, two", "Name the plural of {n}.")
        yield from _worded("plural", noun, wordings, {"n": noun}, plural)


def _count_on(_: int) -> Iterator[Question]:
    for step in (1, 2, 5, 10, -1, -2):
        for start in range(100):
            shown = [start + i * step for i in range(4)]
            if shown[-1] < 0:
                continue
            prompt = f"What comes next: {shown[0]} {shown[1]} {shown[2]}?"
            yield Question("count on", f"{start}{step:+d}", prompt, f"{shown[3]}.")
    for i in range(23):
        a, b, c, d = words.LETTERS[i : i + 4]
        yield Question("count on", a, f"What comes next: {a} {b} {c}?", f"{d}.")


def _distinct(stream: Stream, items: Sequence[str], count: int) -> list[str]:
    """Return ``count`` different items in random order."""
    pool = list(items)
    return [pool.pop(stream.below(len(pool))) for _ in range(count)]


def _sort(seed: int) -> Iterator[Question]:
    stream = Stream(seed, "sort")
    for _ in range(9000):
        items = _distinct(stream, "0123456789", 3 + stream.below(3))
        # Every order of the same numbers is the same key.
        yield Question(
            "sort", "".join(sorted(items)) + "/" + "".join(items), f"Sort these numbers: {' '.join(items)}.",
            f"{' '.join(sorted(items))}.",
        )  # fmt: skip


def _lists(seed: int, name: str, count: int, longest: int) -> Iterator[list[str]]:
    stream = Stream(seed, name)
    for _ in range(count):
        if stream.below(4) == 0:
            yield _distinct(stream, words.LETTERS, 2 + stream.below(longest - 1))
        else:
            yield _distinct(stream, words.NOUNS, 2 + stream.below(longest - 1))


def _copy(seed: int) -> Iterator[Question]:
    for items in _lists(seed, "copy", 8000, 4):
        text = " ".join(items)
        yield Question("copy", text, f"Repeat these words: {text}.", f"{text}.")


def _reverse(seed: int) -> Iterator[Question]:
    for items in _lists(seed, "reverse", 12000, 4):
        text = " ".join(items)
        yield Question("reverse", text, f"Say these words backwards: {text}.", f"{' '.join(items[::-1])}.")


def _pick(seed: int) -> Iterator[Question]:
    stream = Stream(seed, "pick which")
    for items in _lists(seed, "pick", 12000, 4):
        text = " ".join(items)
        which = stream.below(3)
        if which == 0:
            prompt, answer = f"What is the first word of: {text}?", items[0]
        elif which == 1:
            prompt, answer = f"What is the last word of: {text}?", items[-1]
        else:
            place = stream.below(len(items) - 1)
            prompt, answer = f"Which word comes after {items[place]} in: {text}?", items[place + 1]
        yield Question("pick", f"{which}/{text}", prompt, f"{answer}.")


def _how_many(seed: int) -> Iterator[Question]:
    for items in _lists(seed, "how many", 8000, 6):
        text = " ".join(items)
        yield Question("how many", text, f"How many words: {text}?", f"{len(items)}.")


def _number(stream: Stream) -> int:
    """Return a number of one or two digits; small ones are over-represented."""
    return stream.below(10) if stream.below(4) == 0 else stream.below(100)


def _two_numbers(seed: int, name: str, count: int) -> Iterator[tuple[int, int]]:
    stream = Stream(seed, name)
    for _ in range(count):
        a, b = _number(stream), _number(stream)
        if a != b:
            yield a, b


def _unordered(a: int, b: int) -> str:
    return f"{min(a, b)},{max(a, b)}"


def _larger(seed: int) -> Iterator[Question]:
    stream = Stream(seed, "larger which")
    for a, b in _two_numbers(seed, "larger", 9000):
        if stream.below(2):
            yield Question("larger", _unordered(a, b), f"Which is larger, {a} or {b}?", f"{max(a, b)}.")
        else:
            yield Question("larger", _unordered(a, b), f"Which is smaller, {a} or {b}?", f"{min(a, b)}.")


def _yes_no(seed: int) -> Iterator[Question]:
    stream = Stream(seed, "yes or no which")
    for a, b in _two_numbers(seed, "yes or no", 9000):
        word, right = ("larger", a > b) if stream.below(2) else ("smaller", a < b)
        yield Question("yes or no", _unordered(a, b), f"Is {a} {word} than {b}?", "Yes." if right else "No.")


def _parity(_: int) -> Iterator[Question]:
    for number in range(600):
        yield Question(
            "odd or even", str(number), f"Is {number} odd or even?", f"{'odd' if number % 2 else 'even'}."
        )


def _size(_: int) -> Iterator[Question]:
    for i, small in enumerate(words.SIZES):
        for large in words.SIZES[i + 1 :]:
            for a, b in ((small, large), (large, small)):
                a, b = with_article(a), with_article(b)
                yield Question(
                    "size", f"{small},{large}", f"Which is larger, {a} or {b}?", f"{with_article(large)}."
                )
                yield Question(
                    "size",
                    f"{small},{large}",
                    f"Is {a} larger than {b}?",
                    "Yes." if a == with_article(large) else "No.",
                )


def _twice(seed: int) -> Iterator[Question]:
    for items in _lists(seed, "twice", 8000, 3):
        text = " ".join(items)
        yield Question("twice", text, f"Say these words twice: {text}.", f"{text} {text}.")


def _sum(_: int) -> Iterator[Question]:
    for a in range(100):
        for b in range(100):
            yield Question("sum", _unordered(a, b), f"What is {a}+{b}?", f"{a + b}.")


def _difference(_: int) -> Iterator[Question]:
    for a in range(100):
        for b in range(a + 1):
            yield Question("difference", f"{a},{b}", f"What is {a}-{b}?", f"{a - b}.")


WORDING = "a known fact in a wording not seen for it"
RULE = "the rule on new input"

FAMILIES = (
    Family("capital", _capital, 1.0, 0.12, WORDING),
    Family("country", _country, 1.0, 0.12, WORDING),
    Family("opposite", _opposite, 1.2, 0.12, WORDING),
    Family("calendar", _calendar, 0.8, 0.12, WORDING),
    Family("common", _common, 0.8, 0.12, WORDING),
    Family("kind", _kind, 1.2, 0.1, "a thing and a kind not asked together in training"),
    Family("plural", _plural, 1.2, 0.15, "regular: a noun whose plural was never asked; irregular: a new wording"),
    Family("count on", _count_on, 1.5, 0.1, RULE),
    Family("sort", _sort, 1.0, 0.1, RULE),
    Family("copy", _copy, 1.0, 0.1, RULE),
    Family("reverse", _reverse, 1.5, 0.1, RULE),
    Family("twice", _twice, 0.8, 0.1, RULE),
    Family("pick", _pick, 1.3, 0.1, RULE),
    Family("how many", _how_many, 0.5, 0.1, RULE),
    Family("larger", _larger, 1.5, 0.1, RULE),
    Family("yes or no", _yes_no, 0.8, 0.1, RULE),
    Family("odd or even", _parity, 0.8, 0.1, RULE),
    Family("size", _size, 1.0, 0.1, "a pair of animals not compared in training"),
    Family("sum", _sum, 3.0, 0.1, RULE),
    Family("difference", _difference, 2.5, 0.1, RULE),
)
