"""``crossval score``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bitnet_py.score import MIN_CONTEXT
from crossval import api
from crossval.cli import output
from crossval.cli.options import CANDIDATE, FOLLOW, MODEL, THREADS, count, file, plain_command
from crossval.compare.score import ScoreComparison
from crossval.console import console, new_table, plain, show_line
from crossval.engines.registry import live_words
from crossval.errors import BadInputError, UnavailableError, UsageError
from crossval.files import check_regular
from crossval.terms import SIDES


@plain_command(
    "score",
    file("--text", "path", "Text in UTF-8; -: stdin.", required=True),
    MODEL,
    click.option(
        "--reference",
        default="bitnet.cpp",
        show_default=True,
        metavar="|".join(live_words()),
        help="Engine that is right.",
    ),
    CANDIDATE,
    count("--context", "n_context", "Tokens of a window. Default: what both engines hold.", low=MIN_CONTEXT),
    FOLLOW,
    THREADS,
    click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON on stdout."),
)
def command(path: Path, as_json: bool, **options: Any) -> None:
    """Compare how two engines predict a text: perplexity, and the logits of every token bit by bit.

    Teacher-forced: both engines are fed the text's tokens, one per pass, in windows of the context.
    `bitnet score` has the rule of the windows; it evaluates many tokens per pass, which rounds
    otherwise, so its figures are close, not equal. Equal logits show equal outputs, not that every operation is
    right: `crossval layers` looks inside. Exit 0 when the logits of every scored token are equal in
    every bit; 1 when not; 3 when not and the engines state different arithmetic, because then
    unequal bits alone show no fault.

    \b
    Example:
      crossval score --model m.gguf --text text.txt --reference bitnet.cpp
    """
    try:
        with output.progress() as progress:
            say = functools.partial(click.echo, err=True)
            found = api.score_text(_read(path), progress=progress, say=say, **options)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        output.write_json(json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
    else:
        show_score(console(), found)
    raise click.exceptions.Exit(exit_code(found))


def exit_code(found: ScoreComparison) -> int:
    """Return 0 for equal bits, 1 for others, 3 where others show no fault: another arithmetic, the same tokens."""
    if found.equal:
        return 0
    return 1 if found.same_arithmetic or not found.tokenizers_agree else UnavailableError.exit_code


def _read(path: Path) -> bytes:
    if str(path) != "-":
        check_regular(path, "the text")
    try:
        with click.open_file(str(path), "rb") as stream:
            return bytes(stream.read())
    except OSError as error:
        raise BadInputError(f"cannot read the text {path}: {error.strerror or error}") from error


def show_score(out: Console, found: ScoreComparison) -> None:
    """Print both engines' figures, how many tokens have equal logits, and the first that has not."""
    windows = "1 window" if found.n_windows == 1 else f"{found.n_windows} windows"
    show_line(
        out,
        f"{found.n_scored} tokens scored in {windows} of up to {found.n_context}, {found.n_bytes} bytes of text",
    )
    table = new_table()
    for name in ("engine", "mean NLL (nats)", "perplexity", "bits per byte"):
        table.add_column(name, justify="left" if name == "engine" else "right", overflow="fold")
    for side in SIDES:
        figures = found.figures(side)
        values = ("beyond binary64" if value is None else f"{value:.9g}" for value in figures.values())
        table.add_row(f"{side}: {plain(found.engines[side].name)}", *values)
    out.print(table)
    show_line(out, f"logits     equal in every bit for {found.n_equal_logits} of {found.n_scored} scored tokens")
    show_line(out, f"NLL        equal in every bit for {found.n_equal_nll} of {found.n_scored}")
    if not found.same_arithmetic:
        show_line(out, "arithmetic the engines do not state the same, so correct ones may differ in their bits")
    first = found.first_difference
    if first is not None:
        nll = ", ".join(f"{side} {first.nll[side]:.9g}" for side in SIDES)
        show_line(
            out,
            f"first      scored token {first.position} (id {first.token_id}): {first.n_different} of "
            f"{first.vocab_size} logits differ, by at most {first.largest_difference:.3g}; NLL {nll}",
        )
    for note in found.notes:
        show_line(out, f"note: {note}")
