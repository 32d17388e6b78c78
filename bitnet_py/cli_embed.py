"""``bitnet embed``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bitnet_py.arithmetic import MAIN, Arithmetic
from bitnet_py.config import POOLINGS, Pooling
from bitnet_py.embedding import embed, pooling_for
from bitnet_py.integers_option import tokens_option
from bitnet_py.model import Model
from bitnet_py.override_option import override_option
from bitnet_py.token_ids import check_ids


@click.command("embed")
@click.option(
    "--model", "model_path", metavar="PATH", type=click.Path(path_type=Path), required=True, help="GGUF file."
)
@override_option
@click.option("--text", help="Text; special tokens in it are read as such, BOS and EOS added as the file says.")
@tokens_option("Token ids, as they are.")
@click.option(
    "--pooling", type=click.Choice(POOLINGS[1:]), help="How the tokens' vectors become one.  [default: the file's]"
)
@click.option("--no-normalize", is_flag=True, help="Do not divide by the length.")
@click.option("--flash-attention", is_flag=True, help="As bitnet.cpp computes attention unless told otherwise.")
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model_path: Path,
    text: str | None,
    tokens: tuple[int, ...] | None,
    pooling: Pooling | None,
    no_normalize: bool,
    flash_attention: bool,
    n_threads: int | None,
    as_json: bool,
) -> None:
    """Print the vector of a text: its tokens' last hidden states, pooled and divided by their length.

    The arithmetic is that of bitnet.cpp's main. Every number is printed so that reading it as a
    float32 gives the same bits.

    \b
    Example:
      bitnet embed --model embedding-0.6b.gguf --text "query: rivers" --json
      bitnet embed --model embedding-0.6b.gguf --tokens 1,17,42 --pooling last
    """
    if (text is None) == (tokens is None):
        raise click.UsageError("give either --text or --tokens")
    arithmetic = Arithmetic("main", flash_attention=True) if flash_attention else MAIN
    with Model.from_gguf(model_path, n_threads=n_threads, arithmetic=arithmetic) as model:
        chosen = pooling_for(model.config, pooling)
        if text is not None:
            for warning in model.tokenizer.vocabulary.warnings:
                click.echo(f"warning: {warning}", err=True)
            ids = model.tokenizer.encode(text)
        else:
            ids = list(tokens or ())
            check_ids(ids, model.config.vocab_size, model_path.name)
        vector = embed(model, ids, pooling=chosen, normalize=not no_normalize)
    if not as_json:
        click.echo(" ".join(map(str, vector)))
        return
    report = {
        "model": str(model_path),
        "pooling": chosen,
        "normalized": not no_normalize,
        "token_ids": ids,
        "embedding": [float(value) for value in vector],
    }
    click.echo(json.dumps(report, allow_nan=False))
