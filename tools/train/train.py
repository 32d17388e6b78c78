"""Train the model: ``python -m tools.train.train``. Resumes from its last checkpoint exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional

from bitnet_py.tokenizer import Tokenizer
from tools.train import corpus
from tools.train.batches import Batch, Example, Sampler, encode, family_weights, pack, split
from tools.train.model import BitNet
from tools.train.shape import Shape
from tools.train.vocabulary import corpus_texts, load_tokenizer, train_vocabulary

N_PARTS = 2
"""Parts of a batch, one per thread: on two cores faster than two threads in each operation (0.57 s to 0.66 s)."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result of training."""

    seed: int = 0
    n_steps: int = 6500
    n_warmup: int = 200
    n_rows: int = 8
    row_length: int = 128
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    """In the first half; none in the second, as BitNet b1.58 is trained."""
    max_gradient: float = 1.0
    vocab_size: int = 1024

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``: linear warm-up, then a cosine down to 1 %."""
        if step < self.n_warmup:
            return self.learning_rate * (step + 1) / self.n_warmup
        done = (step - self.n_warmup) / max(1, self.n_steps - self.n_warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def decay(self, step: int) -> float:
        """Return the weight decay of ``step``."""
        return self.weight_decay if step < self.n_steps // 2 else 0.0


def tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask, rows and targets of ``batch`` on ``device``."""
    document = torch.from_numpy(batch.document)
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (document[:, :, None] == document[:, None, :]) & causal
    parts = (
        torch.from_numpy(batch.ids),
        mask[:, None],
        torch.from_numpy(batch.rows),
        torch.from_numpy(batch.targets),
    )
    ids, mask, rows, targets = (part.to(device) for part in parts)
    return ids, mask, rows, targets


@torch.no_grad()
def accuracy(net: BitNet, examples: Sequence[Example], recipe: Recipe, device: torch.device) -> float:
    """Return the fraction of examples whose every answer token, EOS included, has the largest logit.

    Greedy generation gives the answer exactly in these cases.
    """
    right, position = 0, 0
    while position < len(examples):
        batch = pack(examples[position:], recipe.n_rows, recipe.row_length)
        ids, mask, rows, targets = tensors(batch, device)
        wrong = net(ids, mask, rows).argmax(dim=-1) != targets
        owner = torch.from_numpy(batch.document.reshape(-1)[batch.rows]).to(device)
        right += batch.n_examples - len(torch.unique(owner[wrong]))
        position += batch.n_examples
    return right / len(examples)


def build_tokenizer(data: corpus.Corpus, vocab_size: int) -> tuple[dict[str, Any], Tokenizer]:
    """Return the vocabulary trained on ``data`` as GGUF metadata, and its tokenizer."""
    metadata = train_vocabulary(corpus_texts(data.train), vocab_size)
    return metadata, load_tokenizer(metadata)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; it appears complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Trainer:
    """A run: network, optimiser, data and the current step."""

    def __init__(
        self, recipe: Recipe, shape: Shape, out: Path, data: corpus.Corpus, *, n_workers: int = 1
    ) -> None:
        self.recipe, self.shape, self.out = recipe, shape, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.metadata, tokenizer = build_tokenizer(data, recipe.vocab_size)
        self.train, self.held_out = (
            {name: [encode(tokenizer, question) for question in questions] for name, questions in group.items()}
            for group in (data.by_family("train"), data.by_family("held_out"))
        )
        self.sampler = Sampler(
            self.train,
            n_rows=recipe.n_rows,
            row_length=recipe.row_length,
            seed=recipe.seed,
            weights=family_weights(),
        )
        torch.manual_seed(recipe.seed)
        self.net = BitNet(shape, recipe.row_length).to(self.device)
        matrices = [p for p in self.net.parameters() if p.ndim == 2]
        norms = [p for p in self.net.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "decays": True}, {"params": norms, "decays": False}],
            lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0,
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(n_workers)
        self.step = 0
        self.elapsed_s = 0.0
        self.log: list[dict[str, Any]] = []

    def advance(self) -> float:
        """Make one step and return its loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
            group["weight_decay"] = recipe.decay(self.step) if group["decays"] else 0.0
        batch = self.sampler.batch(self.step)
        parameters = list(self.net.parameters())

        def part(batch_part: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
            ids, mask, rows, targets = tensors(batch_part, self.device)
            loss = functional.cross_entropy(self.net(ids, mask, rows), targets, reduction="sum")
            loss = loss / len(batch.targets)
            return float(loss.item()), torch.autograd.grad(loss, parameters)

        # Added in the order of the parts, whichever finished first: bit-identical for any number of workers.
        losses, gradients = zip(*self.pool.map(part, split(batch, N_PARTS)), strict=True)
        for parameter, *parts in zip(parameters, *gradients, strict=True):
            parameter.grad = torch.stack(parts).sum(dim=0)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_gradient)
        self.optimizer.step()
        self.step += 1
        return math.fsum(losses)

    def evaluate(self, limit: int) -> dict[str, tuple[float, float]]:
        """Return accuracy per family on up to ``limit`` questions: (training, held out)."""
        return {
            name: (
                accuracy(
                    self.net, self.train[name][:: max(1, len(self.train[name]) // limit)], self.recipe, self.device
                ),
                accuracy(
                    self.net,
                    self.held_out[name][:: max(1, len(self.held_out[name]) // limit)],
                    self.recipe,
                    self.device,
                ),
            )
            for name in self.train
        }

    def save(self) -> None:
        """Write ``checkpoint.pt``: everything that a resumed run needs, and the metadata that export needs."""
        state = {
            "recipe": asdict(self.recipe), "shape": asdict(self.shape), "metadata": self.metadata,
            "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "elapsed_s": self.elapsed_s, "log": self.log,
        }  # fmt: skip
        save(self.out / "checkpoint.pt", state)

    def resume(self) -> bool:
        """Load ``checkpoint.pt`` if there is one. Raises ``click.UsageError`` when it belongs to another run."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = {"recipe": asdict(self.recipe), "shape": asdict(self.shape), "metadata": self.metadata}
        for name, value in mine.items():
            if state[name] != value:
                raise click.UsageError(
                    f"{path}: expected a run of the same {name}, found another; give another --out"
                )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.log = state["step"], state["elapsed_s"], state["log"]
        return True


def report(scores: dict[str, tuple[float, float]]) -> str:
    """Return one line: the mean over families, and the held-out families below 95 %."""
    seen = sum(pair[0] for pair in scores.values()) / len(scores)
    unseen = sum(pair[1] for pair in scores.values()) / len(scores)
    weak = ", ".join(f"{name} {pair[0]:.0%}/{pair[1]:.0%}" for name, pair in scores.items() if pair[1] < 0.95)
    return f"seen {seen:.1%} unseen {unseen:.1%}; below 95 % (seen/unseen): {weak or 'none'}"


def run(trainer: Trainer, *, stop_at: int, eval_every: int, log_every: int) -> None:
    """Train up to step ``stop_at``, with progress lines, evaluations and checkpoints."""
    losses: list[float] = []
    start_s = time.perf_counter() - trainer.elapsed_s
    while trainer.step < stop_at:
        losses.append(trainer.advance())
        trainer.elapsed_s = time.perf_counter() - start_s
        last = trainer.step == stop_at
        if trainer.step % log_every == 0 or last:
            loss = sum(losses) / len(losses)
            losses.clear()
            trainer.log.append({"step": trainer.step, "loss": loss, "elapsed_s": trainer.elapsed_s})
            left_s = trainer.elapsed_s / trainer.step * (stop_at - trainer.step)
            click.echo(
                f"step {trainer.step}/{stop_at}  loss {loss:.4f}  lr {trainer.recipe.rate(trainer.step - 1):.2e}  "
                f"{trainer.elapsed_s / trainer.step:.2f} s/step  {left_s / 60:.0f} min left"
            )
        if trainer.step % eval_every == 0 or last:
            scores = trainer.evaluate(500 if last else 60)
            trainer.log.append(
                {"step": trainer.step, "accuracy": {name: list(pair) for name, pair in scores.items()}}
            )
            click.echo(f"step {trainer.step}  {report(scores)}")
            trainer.save()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/train"), show_default=True)
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=Recipe.n_steps, show_default=True)
@click.option("--rate", type=float, default=Recipe.learning_rate, show_default=True, help="Peak learning rate.")
@click.option(
    "--threads",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="The result is the same with 1 and 2.",
)
@click.option("--stop-at", type=click.IntRange(1), help="Stop after this step; rerun the same command to resume.")
@click.option("--eval-every", type=click.IntRange(1), default=500, show_default=True)
def main(
    out: Path, seed: int, steps: int, rate: float, threads: int, stop_at: int | None, eval_every: int
) -> None:
    """Train the model and write checkpoint.pt and log.json to OUT.

    Example: python -m tools.train.train --out build/train --seed 0
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed, n_steps=steps, learning_rate=rate)
    trainer = Trainer(recipe, Shape(vocab_size=recipe.vocab_size), out, corpus.build(), n_workers=threads)
    if trainer.resume():
        click.echo(f"resumed at step {trainer.step}")
    run(trainer, stop_at=min(stop_at or steps, steps), eval_every=eval_every, log_every=50)
    (out / "log.json").write_text(json.dumps(trainer.log, indent=1) + "\n")


if __name__ == "__main__":
    main()
