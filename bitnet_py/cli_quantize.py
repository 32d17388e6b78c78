"""``bitnet quantize``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bitnet_py.quantize import quantize


@click.command("quantize")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def command(checkpoint: Path, out: Path) -> None:
    """Write a Hugging Face checkpoint as a GGUF file with I2_S matrices.

    CHECKPOINT is a folder with safetensors, config.json and its tokenizer: BitNet 2B-4T (bf16
    masters or packed weights), 1bitLLM models, and ternary models of the Llama architecture. Float
    weights are quantised to absmean codes; packed ones keep codes and scale. `crossval weights OUT
    --against CHECKPOINT` checks the result.

    \b
    Example:
      bitnet quantize bitnet-b1.58-2B-4T-bf16/ 2b-4t.gguf
    """
    shows = sys.stderr is not None and sys.stderr.isatty()

    def progress(name: str, done: int, total: int) -> None:
        if shows:
            click.echo(f"\r{done + 1}/{total} {name:<40}", nl=False, err=True)

    written = quantize(checkpoint, out, progress)
    if shows:
        click.echo(err=True)
    counts = ", ".join(f"{count} {kind}" for kind, count in written.n_tensors.items())
    head = "tied head" if written.tied else "separate head"
    for warning in written.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{out}: {written.arch}, {counts}, {head}, tokenizer {written.pre}", err=True)
