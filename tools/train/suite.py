"""The suites that ``crossval smoke`` asks: ``python -m tools.train.suite`` writes them from the corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bitnet_py.synth_random import Stream
from tools.train import corpus
from tools.train.families import FAMILIES, Question

FOLDER = Path(__file__).resolve().parents[2] / "crossval" / "data" / "smoke"
PER_FAMILY = 25
UNSEEN_PER_FAMILY = 15

FIXED = (
    ("sum", "What is 2+2?", "4."),
    ("capital", "What is the capital of France?", "Paris."),
    ("opposite", "What is the opposite of hot?", "cold."),
    ("calendar", "What day comes after Monday?", "Tuesday."),
    ("count on", "What comes next: 4 5 6?", "7."),
    ("sort", "Sort these numbers: 3 1 2.", "1 2 3."),
    ("reverse", "Say these words backwards: sun moon star.", "star moon sun."),
    ("yes or no", "Is 7 larger than 3?", "Yes."),
    ("plural", "What is the plural of cat?", "cats."),
    ("twice", "Say these words twice: fish cake.", "fish cake fish cake."),
)

EVERYDAY = (
    ("arithmetic", "What is 2+2?", r"\b(4|four)\b"),
    ("arithmetic", "What is 7 times 6?", r"\b(42|forty[- ]two)\b"),
    ("arithmetic", "How many minutes are in an hour?", r"\b(60|sixty)\b"),
    ("arithmetic", "Is 17 a prime number?", r"\b(yes|is a prime|is prime|a prime number)\b"),
    ("geography", "What is the capital of France?", r"\bParis\b"),
    ("geography", "What is the capital of Japan?", r"\bTokyo\b"),
    ("geography", "Which continent is Egypt in?", r"\bAfrica\b"),
    ("geography", "What is the largest ocean on Earth?", r"\bPacific\b"),
    ("language", "What is the opposite of hot?", r"\b(cold|cool)\b"),
    ("language", "What is the plural of mouse?", r"\bmice\b"),
    ("language", "What is the French word for water?", r"\beau\b"),
    ("calendar", "What day comes after Monday?", r"\bTuesday\b"),
    ("calendar", "How many days are in a week?", r"\b(7|seven)\b"),
    ("calendar", "What is the first month of the year?", r"\bJanuary\b"),
    ("nature", "What colour is the sky on a clear day?", r"\bblue\b"),
    ("nature", "How many legs does a spider have?", r"\b(8|eight)\b"),
    ("nature", "What gas do plants take in from the air?", r"\b(carbon dioxide|CO2|CO₂)"),
    ("science", "What is the chemical formula of water?", r"H(2|₂)O"),
    ("science", "Which planet is closest to the Sun?", r"\bMercury\b"),
    ("science", "At what temperature in Celsius does water boil?", r"\b(100|hundred)"),
    ("culture", "Who wrote Romeo and Juliet?", r"\bShakespeare\b"),
    ("culture", "Who painted the Mona Lisa?", r"\b(Leonardo|da Vinci)\b"),
)
"""For models with general knowledge; the answer is searched for, ignoring case."""


def _draw(stream: Stream, questions: Sequence[Question], count: int) -> list[Question]:
    """Return ``count`` different questions in the order they were drawn."""
    pool = list(questions)
    return [pool.pop(stream.below(len(pool))) for _ in range(count)]


def fixed_10(data: corpus.Corpus) -> list[dict[str, Any]]:
    """Return the ten fixed prompts."""
    seen = {question.prompt for question in data.train}
    return [
        {"id": f"fixed-{n}", "family": family, "seen": prompt in seen, "prompt": prompt, "answer": answer}
        for n, (family, prompt, answer) in enumerate(FIXED, 1)
    ]


def long_500(data: corpus.Corpus) -> list[dict[str, Any]]:
    """Return the long suite: 25 questions of each family, up to 15 of them never seen in training."""
    train, held_out = data.by_family("train"), data.by_family("held_out")
    lines: list[dict[str, Any]] = []
    for family in FAMILIES:
        stream = Stream(corpus.SEED, f"suite {family.name}")
        unseen = _draw(stream, held_out[family.name], min(UNSEEN_PER_FAMILY, len(held_out[family.name])))
        seen = _draw(stream, train[family.name], PER_FAMILY - len(unseen))
        for n, question in enumerate(seen + unseen, 1):
            lines.append(
                {
                    "id": f"{family.name.replace(' ', '-')}-{n:02d}",
                    "family": family.name,
                    "seen": n <= len(seen),
                    "prompt": question.prompt,
                    "answer": question.answer,
                }
            )
    return lines


def everyday() -> list[dict[str, Any]]:
    """Return everyday questions whose answers are regular expressions."""
    return [
        {"id": f"everyday-{n:02d}", "family": family, "prompt": prompt, "pattern": f"(?i){pattern}"}
        for n, (family, prompt, pattern) in enumerate(EVERYDAY, 1)
    ]


def build(data: corpus.Corpus) -> dict[str, str]:
    """Return the text of every suite file by its stem."""
    suites = {"fixed-10": fixed_10(data), "long-500": long_500(data), "everyday": everyday()}
    return {
        name: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for name, lines in suites.items()
    }


def read(name: str) -> list[dict[str, Any]]:
    """Return the lines of the shipped suite ``name``."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


@click.command()
def main() -> None:
    """Write the suites into crossval/data/smoke.

    Example: python -m tools.train.suite
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in build(corpus.build()).items():
        path = FOLDER / f"{name}.jsonl"
        path.write_text(text, "utf-8")
        click.echo(f"{path}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
