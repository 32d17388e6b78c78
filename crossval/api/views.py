"""What ``floors`` and ``causal`` add to a comparison: the view itself, or a note that states why not.

Errors that can be detected before the comparison are raised immediately. A failure after it does not
lose the comparison: the receipt gets a note instead, and without a requested view it does not pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from crossval.api.request import Request
from crossval.bitnet_cpp.remedies import BUILD
from crossval.capture import Capture
from crossval.causal import receipt as causal_receipt
from crossval.causal.view import view_of_engines
from crossval.compare.receipt import row_from_json, row_to_json
from crossval.compare.rows import LayersResult
from crossval.engines.registry import find_word, row_of
from crossval.engines.session import Prompt, Session
from crossval.errors import BadInputError, CrossvalError, EngineCrashError, UnavailableError, UsageError
from crossval.model.weights import SpecWeights
from crossval.passes import Runner
from crossval.repeat import floors_receipt
from crossval.repeat.floors import measure_floors

N_DECODE = 2
"""Tokens fed token by token where the number of threads varies; fewer with a short prompt."""


def check_words(request: Request) -> None:
    """Reject floors of a reference that cannot run in another way.

    Raises:
        UsageError: the reference is the specification or a trace.
    """
    if not request.floors:
        return
    why = row_of(find_word("reference", request.reference)).one_way
    if why is not None:
        raise UsageError(f"--floors needs a live engine as the reference: {why}")


def check_reference(request: Request, reference: Runner, prompt: Prompt) -> None:
    """Reject a reference that is a recorded one, and a prompt that can be fed in one way only.

    Raises:
        UnavailableError: the reference is a trace; our own engine never stands in for it.
        UsageError: the prompt has one token.
    """
    if not request.floors:
        return
    if reference.plan is not None:
        raise UnavailableError(
            f"--floors runs the reference against itself, and this one is a trace of {reference.identity.name}, "
            "which cannot be run; our own engine does not stand in for it. Build bitnet.cpp "
            f"(`{BUILD}`) or leave --floors out"
        )
    if len(prompt.token_ids) < 2:
        raise UsageError("--floors needs a prompt of at least 2 tokens: one token can be fed in one way only")


def make(
    request: Request,
    session: Session,
    captures: tuple[Capture, Capture],
    prompt: Prompt,
    result: LayersResult,
) -> tuple[dict[str, Any], list[str]]:
    """Return the requested views as a receipt states them, and a note for each that could not be made.

    Raises:
        UnavailableError, EngineCrashError: from a runner.
    """
    made: dict[str, Any] = {}
    notes = []
    if request.floors:
        try:
            table = measure_floors(
                partial(session.reopen, "reference"),
                [prompt.token_ids],
                n_layers=result.n_layers,
                n_decode=min(N_DECODE, len(prompt.token_ids) - 2),
                thread_counts=floors_receipt.THREAD_COUNTS,
                progress=request.progress,
            )
            rows = [row_from_json(row_to_json(row)) for row in result.rows]
            made["floors"] = floors_receipt.to_json(table, rows)
        except (UnavailableError, EngineCrashError):
            raise
        except CrossvalError as error:
            notes.append(f"no floors: {error}")
    if request.causal:
        try:
            weights = SpecWeights(session.model.path)
            if request.follow_reference_graph:
                weights = weights.following(captures[1].runner.identity.numerics.generation)
            view = view_of_engines(*captures, weights, progress=request.progress)
            made["causal"] = causal_receipt.to_json(view)
        except BadInputError as error:
            notes.append(f"no causal view: {error}")
    return made, notes
