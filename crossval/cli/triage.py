"""``crossval triage``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.options import causal_option, compare_options, decode_option, floors_option, repro_option


@click.command("triage")
@click.option("--prompt", required=True, metavar="TEXT", help="Text both engines read.")
@decode_option
@floors_option
@causal_option
@repro_option
@compare_options
def command(
    prompt: str,
    n_decode: int | None,
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
    """Say in plain words which side is wrong, and what to do next.

    The examination is that of `crossval layers`, and so are receipt and exit code. Same output from both engines:
    the model or its configuration. Reference right, candidate wrong: the candidate's bug, named. Both wrong in
    different ways: what both are given, tokens and configuration.

    \b
    Example:
      crossval triage --prompt "What is 2+2?"
    """
    words = (candidate, reference, n_threads, template, receipt_path, as_json)
    request = run.Request("layers", model_path, *words, repro_dir, floors, causal)
    run.compare_prompt(request, prompt, n_decode=n_decode, plain_words=True)
