"""``--engine``: commands that run one engine or both, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import click

from crossval.bitnet_cpp import library
from crossval.cli import comparison as run
from crossval.engines.session import Session
from crossval.errors import UnavailableError
from crossval.passes import Runner
from crossval.receipts.kind import RunFacts, build_unavailable
from crossval.receipts.party import Party
from crossval.registry import KINDS
from crossval.smoke import ask as smoke
from crossval.terms import Side

F = TypeVar("F", bound=Callable[..., Any])

SIDES: dict[str, tuple[Side, ...]] = {
    "candidate": ("candidate",),
    "reference": ("reference",),
    "both": ("candidate", "reference"),
}


def engine_option(help_text: str) -> Callable[[F], F]:
    """Add ``--engine``."""
    return click.option(
        "--engine", type=click.Choice(list(SIDES)), default="candidate", show_default=True, help=help_text
    )


def live_word(reference: str) -> str:
    """Return which reference is meant where a recorded one is of no use."""
    return "bitnet.cpp" if reference == "auto" else reference


def open_sides(
    session: Session, sides: tuple[Side, ...], *, recorded_cannot: str = "answer other prompts"
) -> dict[Side, Runner]:
    """Return the engines that are asked, each able to run any prompt; ``recorded_cannot``: for messages.

    Raises:
        UnavailableError: bitnet.cpp is not built, or an engine is a recorded trace.
    """
    if "reference" in sides and session.words[1] == "bitnet.cpp" and library.find_library() is None:
        raise UnavailableError(
            f"bitnet.cpp is not built here, and what is recorded of it cannot {recorded_cannot}; "
            "run `make fetch-cpp` (or set BITNET_CPP_DIR or BITNET_CPP_LIB), or use --engine candidate"
        )
    if len(sides) == 2:
        ours, theirs = session.open()
        runners: dict[Side, Runner] = {"candidate": ours, "reference": theirs}
    else:
        runners = {side: session.open_alone(side) for side in sides}
    for side in sides:
        smoke.require_any_prompt(runners[side], side, recorded_cannot)
    return runners


def without_unused(facts: RunFacts, sides: tuple[Side, ...]) -> RunFacts:
    """Mark the engine that was not asked."""
    if "reference" not in sides:
        facts = replace(facts, reference=Party("unused", facts.reference.identity))
    if "candidate" not in sides:
        facts = replace(facts, candidate=Party("unused", facts.candidate.identity))
    return facts


@contextmanager
def unavailable_receipt(
    session: Session, request: run.Request, sides: tuple[Side, ...], **settings: Any
) -> Iterator[None]:
    """Leave a receipt that says so when an engine cannot be had, then let the error go on."""
    try:
        yield
    except UnavailableError as error:
        if request.as_json or request.receipt_path is not None:
            facts = run.context(session, request, [], **settings)
            why = str(error)
            if "reference" in sides:
                facts = replace(facts, reference=session.unavailable(why))
            else:
                facts = replace(facts, candidate=Party("unavailable", facts.candidate.identity, note=why))
            made = build_unavailable(KINDS[request.kind].kind, without_unused(facts, sides))
            run.publish(made, request)
        raise
