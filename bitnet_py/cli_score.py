"""``bitnet score``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from bitnet_py.model import Model
from bitnet_py.override_option import override_option
from bitnet_py.resources import default_model_path
from bitnet_py.score import MIN_CONTEXT, score


@click.command("score")
@click.option(
    "--model",
    "model_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="GGUF file.  [default: the model that ships with the project]",
)
@override_option
@click.option(
    "--context",
    "n_context",
    type=click.IntRange(min=MIN_CONTEXT),
    help="Tokens of a window.  [default: the model's context]",
)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("text", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))
def command(
    model_path: Path | None, n_context: int | None, n_threads: int | None, as_json: bool, text: Path
) -> None:
    """Show how well a model predicts the text in FILE (-: stdin): perplexity and bits per byte.

    The text is UTF-8, read as plain text, and cut into windows of the context. In each window the
    first token is only context (BOS, or the token before the window), the others are scored, each
    given all before it in the window. docs/score.md has the definitions; `crossval score` compares
    with bitnet.cpp token by token.

    \b
    Example:
      bitnet score --model m.gguf text.txt
      bitnet score --context 512 --json text.txt
    """
    with click.open_file(str(text), "rb") as file:
        data = file.read()
    path = default_model_path() if model_path is None else model_path
    with Model.from_gguf(path, n_threads=n_threads) as model:
        for warning in model.tokenizer.vocabulary.warnings:
            click.echo(f"warning: {warning}", err=True)
        found = score(model, data, n_context)
    if as_json:
        finite = math.isfinite(found.perplexity)
        report = {
            "model": str(path),
            "n_scored": int(found.nll.size),
            "n_bytes": found.n_bytes,
            "n_windows": found.n_windows,
            "n_context": found.n_context,
            "mean_nll": found.mean_nll,
            "perplexity": found.perplexity if finite else None,
            "bits_per_byte": found.bits_per_byte,
        }
        click.echo(json.dumps(report, allow_nan=False))
        return
    plural = "" if found.n_windows == 1 else "s"
    click.echo(f"tokens scored  {found.nll.size} in {found.n_windows} window{plural} of up to {found.n_context}")
    click.echo(f"mean NLL       {found.mean_nll:.6f} nats per token")
    click.echo(f"perplexity     {found.perplexity:.4f}")
    click.echo(f"bits per byte  {found.bits_per_byte:.4f} over {found.n_bytes} bytes")
