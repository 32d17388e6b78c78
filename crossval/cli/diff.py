"""``crossval diff``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.options import causal_option, model_option, output_options, repro_option
from crossval.engines.recorded import RecordedRunner
from crossval.engines.session import Prompt, Session
from crossval.errors import BadInputError
from crossval.passes import Runner


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
@causal_option
@repro_option
@model_option
@output_options
def command(
    trace_a: Path,
    trace_b: Path,
    n_decode: int | None,
    full: bool,
    causal: bool,
    repro_dir: Path | None,
    model_path: Path | None,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Find out which of two recorded traces of one model is wrong, and where; no engine is needed.

    TRACE_A is the candidate, TRACE_B the reference. Both must hold the same tokens in the same passes. Where a
    trace does not hold every operation, several are judged as one.

    \b
    Example:
      crossval diff my-engine-trace/ bitnet-cpp-trace/ --model model.gguf
    """
    for path in (trace_a, trace_b):
        if not path.is_dir():
            raise BadInputError(f"{path} is not a directory with a trace")
    words = (str(trace_a.resolve()), str(trace_b.resolve()))
    request = run.Request("diff", model_path, *words, None, None, receipt_path, as_json, repro_dir, causal=causal)
    with run.progress() as report:
        model = run.load_model(request, report)
        with Session(model, *words) as session:
            ours, theirs = session.open()
            prompt = _prompt(ours, theirs)
            decodes = n_decode if n_decode is not None else max(map(_n_decode, (ours, theirs)))
            made = run.examine(session, request, (ours, theirs), prompt, report, n_decode=decodes, full=full)
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
