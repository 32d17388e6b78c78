"""``crossval triage``: two engines examined and told in plain words, or nothing but a text judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import crossval
from crossval.api.texts import MAX_TEXT_BYTES
from crossval.cli import output
from crossval.cli.exits import EXIT_OF_JUDGEMENT
from crossval.cli.options import (
    CAUSAL,
    DECODE,
    ENGINES,
    FLOORS,
    OUTPUT,
    PROMPT,
    REPRO,
    file,
    plain_command,
    receipt_command,
    refuse_others,
)
from crossval.errors import BadInputError
from crossval.files import STREAM, read_limited
from crossval.receipts.file import Receipt
from crossval.texts.show import show_text

OPTIONS = (PROMPT, DECODE, FLOORS, CAUSAL, REPRO, *ENGINES)
TEXT = file(
    "--output",
    "text_path",
    "Judge this text (-: stdin), which an engine printed after the prompt, and run no engine under test; with "
    "--model, compare it with the right continuation.",
)
OF_TEXTS = ("prompt", "model", "override", "template", "text_path", "as_json")
"""Options that a text is judged with; the others are about engines."""


@receipt_command("triage", *OPTIONS, plain_words=True)
def _examined(**options: Any) -> Receipt:
    return crossval.compare_engines(**options)


@plain_command("triage", TEXT, *OPTIONS, *OUTPUT)
@click.pass_context
def command(context: click.Context, /, text_path: Path | None, **options: Any) -> None:
    """State in plain words which side causes bad output, and what to do next.

    Runs the same examination as `crossval layers`, with the same receipt and exit codes. If both
    engines give the same output, look at the model or its configuration; if the reference is correct
    and the candidate wrong, the candidate has a bug, which is reported; if both are wrong in
    different ways, look at what both are given: tokens and configuration.

    With `--output FILE`, nothing but the text of a broken engine is judged: suspects are ranked by
    how many known faults make an engine print such a text. No cause is established.

    \b
    Example:
      crossval triage --prompt "What is 2+2?"
      crossval triage --prompt "What is 2+2?" --output text-of-my-engine.txt --model model.gguf
    """
    if text_path is None:
        assert _examined.callback is not None
        _examined.callback(**options)
        return
    refuse_others(context, OF_TEXTS, "is about engines, and --output judges a text: no engine of it is run")
    found = crossval.explain_text(
        _read(text_path), options["prompt"], options["model"], template=options["template"]
    )
    if options["as_json"]:
        output.write_json(json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    else:
        show_text(output.screen(), found)
    context.exit(EXIT_OF_JUDGEMENT[found.judgement])


def _read(path: Path) -> bytes:
    if path == STREAM:
        return read_limited(path, "the text", MAX_TEXT_BYTES)
    try:
        with path.open("rb") as source:
            return source.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from error
