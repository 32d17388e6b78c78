"""Count a model's correct answers, through the engine, without PyTorch: ``python -m tools.train.evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bitnet_py import Model
from bitnet_py.generate import generate
from bitnet_py.sampler import GreedySampler
from tools.train import corpus, suite

MAX_TOKENS = 32


@dataclass(frozen=True)
class Score:
    """Correct answers and questions, separately for those that training saw and those that it did not."""

    family: str
    seen_right: int = 0
    n_seen: int = 0
    unseen_right: int = 0
    n_unseen: int = 0

    def add(self, *, seen: bool, right: bool) -> Score:
        """Return the score with one more question."""
        return Score(
            self.family,
            self.seen_right + (seen and right),
            self.n_seen + seen,
            self.unseen_right + (not seen and right),
            self.n_unseen + (not seen),
        )

    def row(self) -> str:
        """Return the score as a row of a Markdown table."""
        right, n = self.seen_right + self.unseen_right, self.n_seen + self.n_unseen
        return (
            f"| {self.family} | {_share(self.seen_right, self.n_seen)} "
            f"| {_share(self.unseen_right, self.n_unseen)} | {_share(right, n)} |"
        )


def _share(right: int, n: int) -> str:
    return f"{right}/{n} ({right / n:.1%})" if n else "–"


def answer(model: Model, prompt: str) -> str:
    """Return what the model generates greedily after ``prompt``, up to its end token."""
    tokenizer = model.tokenizer
    tokens = generate(
        model, tokenizer.encode(prompt), max_tokens=MAX_TOKENS, sampler=GreedySampler(), stop_ids=tokenizer.eos_ids
    )
    return tokenizer.decode(token.id for token in tokens)


def ask(model: Model, lines: Iterable[dict[str, Any]]) -> tuple[list[Score], list[dict[str, Any]]]:
    """Return the score per family and in total, and the wrongly answered lines with the answer ``found``."""
    scores: dict[str, Score] = {}
    total = Score("all")
    wrong: list[dict[str, Any]] = []
    for line in lines:
        found = answer(model, line["prompt"])
        right = found.strip() == line["answer"]
        family = line["family"]
        scores[family] = scores.get(family, Score(family)).add(seen=line["seen"], right=right)
        total = total.add(seen=line["seen"], right=right)
        if not right:
            wrong.append({**line, "found": found})
    if not scores:
        raise click.UsageError("expected questions, found none")
    return [*scores.values(), total], wrong


def held_out_lines() -> list[dict[str, Any]]:
    """Return every held-out question of the corpus."""
    return [
        {"family": question.family, "seen": False, "prompt": question.prompt, "answer": question.answer}
        for question in corpus.build().held_out
    ]


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    head = "| family | seen | unseen | all |\n|---|---|---|---|"
    return "\n".join([head, *(score.row() for score in scores)])


@click.command()
@click.option(
    "--model", "path", type=click.Path(path_type=Path, exists=True), default=Path("models/bitnet-qa.gguf")
)
@click.option("--suite", "name", type=click.Choice(["fixed-10", "long-500", "held-out"]), default="long-500")
@click.option("--show-wrong", is_flag=True, help="Print every wrong answer as a JSON line.")
def main(path: Path, name: str, show_wrong: bool) -> None:
    """Print the accuracy of a GGUF model per family; held-out means every question kept from training.

    Example: python -m tools.train.evaluate --model models/bitnet-qa.gguf --suite long-500
    """
    lines = held_out_lines() if name == "held-out" else suite.read(name)
    with Model.from_gguf(path) as model:
        scores, wrong = ask(model, lines)
    click.echo(table(scores))
    if show_wrong:
        for line in wrong:
            click.echo(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
