"""What ``--floors`` and ``--causal`` add to a comparison: they are made here, or a note says why not.

Whatever can be known before the comparison stops the command at once. What fails after it must not take the
comparison along: the receipt gets a note, and the command cannot exit 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crossval.capture import Capture
from crossval.causal import receipt as causal_receipt
from crossval.causal.view import view_of_engines
from crossval.compare.rows import LayersResult
from crossval.engines.session import Prompt, Session
from crossval.errors import BadInputError, CrossvalError, EngineCrashError, UnavailableError
from crossval.model.weights import SpecWeights
from crossval.passes import Runner
from crossval.receipts import evidence
from crossval.receipts.file import Receipt
from crossval.repeat import floors_receipt
from crossval.repeat.floors import measure_floors
from crossval.terms import Progress

if TYPE_CHECKING:
    from crossval.cli.comparison import Request

N_DECODE = 2
"""Tokens that are decoded one by one where the number of threads varies; fewer of a short prompt."""


def check_words(request: Request) -> None:
    """Refuse to measure floors of what cannot be run in another way.

    Raises:
        click.UsageError: the reference is the specification or a trace.
    """
    if request.floors and (request.reference == "spec" or Path(request.reference).is_dir()):
        what = (
            "the specification computes in one way only"
            if request.reference == "spec"
            else "a trace cannot be run again"
        )
        raise click.UsageError(f"--floors needs a live engine as the reference: {what}")


def check_reference(request: Request, reference: Runner, prompt: Prompt) -> None:
    """Refuse a reference that turned out to be recorded, and a prompt that there is only one way to feed.

    Raises:
        UnavailableError: the reference is a trace; our own engine never stands in for it.
        click.UsageError: the prompt has one token.
    """
    if not request.floors:
        return
    if reference.plan is not None:
        raise UnavailableError(
            f"--floors runs the reference against itself, and this one is a trace of {reference.identity.name}, "
            "which cannot be run; our own engine does not stand in for it. Build bitnet.cpp (`make fetch-cpp`) or "
            "leave --floors out"
        )
    if len(prompt.token_ids) < 2:
        raise click.UsageError(
            "--floors needs a prompt of at least 2 tokens: one token can be fed in one way only"
        )


def make(
    request: Request,
    session: Session,
    captures: tuple[Capture, Capture],
    prompt: Prompt,
    result: LayersResult,
    report: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Return what was asked for as a receipt holds it, and a note for each that could not be made.

    Raises:
        UnavailableError, EngineCrashError: from a runner.
    """
    made: dict[str, Any] = {}
    notes = []
    rows = [evidence.row_from_json(evidence.row_to_json(row)) for row in result.rows]
    if request.floors:
        n_decode = min(N_DECODE, len(prompt.token_ids) - 2)
        try:
            table = measure_floors(
                session.another_reference,
                [prompt.token_ids],
                n_layers=result.n_layers,
                n_decode=n_decode,
                thread_counts=floors_receipt.THREAD_COUNTS,
                progress=report,
            )
            made["floors"] = floors_receipt.to_json(table, rows)
        except (UnavailableError, EngineCrashError):
            raise
        except CrossvalError as error:
            notes.append(f"no floors: {error}")
    if request.causal:
        try:
            view = view_of_engines(*captures, SpecWeights(session.model.path), progress=report)
            made["causal"] = causal_receipt.to_json(view)
        except BadInputError as error:
            notes.append(f"no causal view: {error}")
    return made, notes


def exit_code(made: Receipt) -> int:
    """Return 3 when something that was asked for is missing from the receipt, else 0."""
    missing = [name for name in evidence.VIEWS if made["settings"].get(name) and name not in made]
    return UnavailableError.exit_code if missing else 0
