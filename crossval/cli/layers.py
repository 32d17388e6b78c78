"""``crossval layers``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.options import causal_option, compare_options, decode_option, floors_option, repro_option


@click.command("layers")
@click.option("--prompt", required=True, metavar="TEXT", help="Text both engines read.")
@decode_option
@click.option("--full", is_flag=True, help="Compare every operation of every layer, not only of the one found.")
@floors_option
@causal_option
@repro_option
@compare_options
def command(
    prompt: str,
    n_decode: int | None,
    full: bool,
    floors: bool,
    causal: bool,
    repro_dir: Path | None,
    model_path: Path | None,
    reference: str,
    candidate: str,
    n_threads: int | None,
    template: str,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Find out which of two engines is wrong, and in which layer and operation.

    Runs the prompt and a few decoded tokens through both engines and compares every layer's output, then the
    operations of the first layer that differs (`=`: all bits are equal). Then recomputes every operation of each
    engine from that engine's own inputs and checks it against its error bound: the first operation
    beyond its bound is guilty, on whichever side it is.

    \b
    Example:
      crossval layers --prompt "What is 2+2?" --receipt receipt.json
    """
    words = (candidate, reference, n_threads, template, receipt_path, as_json)
    request = run.Request("layers", model_path, *words, repro_dir, floors, causal)
    run.compare_prompt(request, prompt, n_decode=n_decode, full=full)
