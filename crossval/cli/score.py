"""``crossval score``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import crossval
from bitnet_py.score import MIN_CONTEXT
from crossval.cli.options import CANDIDATE, FOLLOW, MODEL, THREADS, count, engine_option, file, receipt_command
from crossval.engines.registry import live_words
from crossval.errors import BadInputError
from crossval.files import check_regular
from crossval.receipts.file import Receipt


@receipt_command(
    "score",
    file("--text", "path", "Text in UTF-8; -: stdin.", required=True),
    MODEL,
    engine_option("reference", live_words(), "bitnet.cpp", "Engine that is right."),
    CANDIDATE,
    count("--context", "n_context", "Tokens of a window. Default: what both engines hold.", low=MIN_CONTEXT),
    FOLLOW,
    THREADS,
)
def command(path: Path, **options: Any) -> Receipt:
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
    return crossval.score_text(_read(path), **options)


def _read(path: Path) -> bytes:
    if str(path) != "-":
        check_regular(path, "the text")
    try:
        with click.open_file(str(path), "rb") as stream:
            return bytes(stream.read())
    except OSError as error:
        raise BadInputError(f"cannot read the text {path}: {error.strerror or error}") from error
