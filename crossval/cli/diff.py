"""``crossval diff``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval import evidence
from crossval.cli import run
from crossval.cli.options import model_option, output_options
from crossval.errors import BadInputError
from crossval.localize import compare_layers
from crossval.runners.base import Runner
from crossval.runners.recorded import RecordedRunner
from crossval.session import Prompt, Session


@click.command("diff")
@click.argument("trace_a", type=click.Path(path_type=Path))
@click.argument("trace_b", type=click.Path(path_type=Path))
@click.option(
    "--decode",
    "n_decode",
    type=click.IntRange(0, 100_000),
    metavar="N",
    help="Decoded tokens to compare. Default: all that the longer trace holds.",
)
@click.option("--full", is_flag=True, help="Compare every operation of every layer, not only of the one found.")
@model_option
@output_options
def command(
    trace_a: Path,
    trace_b: Path,
    n_decode: int | None,
    full: bool,
    model_path: Path | None,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Compare two recorded traces of one model; no engine is needed.

    TRACE_A is the candidate, TRACE_B the reference. Both must hold the same tokens in the same passes.

    \b
    Example:
      crossval diff my-engine-trace/ bitnet-cpp-trace/ --model model.gguf
    """
    for path in (trace_a, trace_b):
        if not path.is_dir():
            raise BadInputError(f"{path} is not a directory with a trace")
    words = (str(trace_a.resolve()), str(trace_b.resolve()))
    request = run.Request("diff", model_path, *words, None, None, receipt_path, as_json)
    with run.progress() as report:
        model = run.load_model(request, report)
        with Session(model, *words) as session:
            ours, theirs = session.open()
            prompt = _prompt(ours, theirs)
            decodes = n_decode if n_decode is not None else max(map(_n_decode, (ours, theirs)))
            result = compare_layers(
                ours,
                theirs,
                prompt.token_ids,
                n_layers=model.config.n_layers,
                n_decode=decodes,
                full=full,
                progress=report,
            )
            done = sum(plan.kind == "decode" for plan in result.plan)
            facts = run.context(session, request, [prompt], full=full, n_decode=done)
            made = evidence.build("diff", result, facts)
    run.finish(made, request)


def _prompt(ours: Runner, theirs: Runner) -> Prompt:
    """Return the prompt of the second trace, which the first must share."""
    assert isinstance(ours, RecordedRunner)
    assert isinstance(theirs, RecordedRunner)
    if ours.info.prompt_ids != theirs.info.prompt_ids:
        raise BadInputError(
            f"the traces were recorded with different prompts: {list(ours.info.prompt_ids[:8])} in "
            f"{ours.trace.directory}, {list(theirs.info.prompt_ids[:8])} in {theirs.trace.directory}"
        )
    return Prompt(theirs.info.prompt_text, theirs.info.prompt_ids, None)


def _n_decode(runner: Runner) -> int:
    return sum(plan.kind == "decode" for plan in runner.plan or ())
