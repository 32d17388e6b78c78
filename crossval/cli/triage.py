"""``crossval triage``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import run, views
from crossval.cli.options import causal_option, compare_options, decode_option, floors_option, repro_option
from crossval.session import Session


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
    """Say in plain words whose fault bad output is, and what to do next.

    The examination is that of `crossval layers`, and so are receipt and exit code. Same output from both engines:
    the model or its configuration. Reference right, candidate wrong: the candidate's bug, named. Both wrong in
    different ways: what both are given, tokens and configuration.

    \b
    Example:
      crossval triage --prompt "What is 2+2?"
    """
    words = (candidate, reference, n_threads, template, receipt_path, as_json)
    request = run.Request("layers", model_path, *words, repro_dir, floors, causal)
    views.check_words(request)
    run.check_text(prompt)
    with run.progress() as report:
        model = run.load_model(request, report)
        with (
            Session(model, candidate, reference, n_threads) as session,
            run.unavailable_receipt(session, request, full=False, n_decode=n_decode),
        ):
            ours, theirs, encoded = run.open_prompt(session, request, prompt)
            made = run.examine(session, request, (ours, theirs), encoded, report, n_decode=n_decode, full=False)
    run.finish(made, request, plain_words=True)
