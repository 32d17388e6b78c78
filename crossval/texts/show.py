"""A judged text for people: what it looks like, the suspects with their counts, and what to run next."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from crossval.console import show_line
from crossval.texts.evidence import FIRST, Suspect, evidence
from crossval.texts.finding import AROUND, TextFinding

SHOWN = 60
"""Characters of a text that are shown."""
NAMED = 3
"""Faults that are named as examples."""
MORE = 5
"""Classes that are listed after the first ones."""
DEPARTS = {
    "at once": "wrong from the first token",
    "later": "wrong after right tokens",
    "stops early": "right but stopping early",
    "goes on": "right but not stopping",
}


def show_text(out: Console, found: TextFinding) -> None:
    """Print a judged text."""
    for label, text in lines(found):
        show_line(out, f"{label:11}  {text}")


def lines(found: TextFinding) -> Iterator[tuple[str, str]]:
    """Yield what was found as labelled sentences."""
    removed = ", after a copy of the prompt" if found.prompt_removed else ""
    yield "text", f"{len(found.text)} characters{removed}: {_quoted(found.text)}"
    yield "looks", str(found.signature.form)
    yield "compared", _compared(found)
    if found.judgement == "right":
        faults = evidence().faults
        silent = (
            f"{sum(fault.silent for fault in faults)} of {len(faults)} faults of the zoo show in no text measured"
        )
        yield "suspects", f"none from this text, which proves nothing about the engine: {silent}"
    else:
        yield from _suspects(found)
    for number, step in enumerate(found.steps(), 1):
        yield "what to do" if number == 1 else "", f"{number}. {step}"


def _suspects(found: TextFinding) -> Iterator[tuple[str, str]]:
    measured, by, suspects = evidence(), found.ranked_by, found.suspects
    if by != found.signature:
        departs = DEPARTS[str(found.signature.departure)]
        yield "measured", f"no fault made an engine print such a text {departs}; by its looks alone:"
    n_faults = sum(len(one.faults) for one in suspects)
    like = by.form if by.departure is None else f"{by.form}, {DEPARTS[by.departure]}"
    counted = f"of {len(measured.faults)} faults in {measured.n_engines} engines"
    yield "measured" if by == found.signature else "", f"{counted}, {n_faults} made one print such a text ({like})"
    for number, suspect in enumerate(suspects[:FIRST], 1):
        yield "suspects" if number == 1 else "", f"{number}. {_suspect(suspect)}"
    more = suspects[FIRST:]
    if more:
        listed = ", ".join(f"{one.family} ({len(one.faults)} of {one.of})" for one in more[:MORE])
        yield "", f"less often: {listed}" + (f", {len(more) - MORE} more classes" if len(more) > MORE else "")
    if found.signature.departure is not None:
        yield "passes", _passes(str(found.signature.departure))
    share, blind = found.share(), found.share(blind=True).found
    tried = f"of such texts to other prompts, {share} were of a class among the first {FIRST}"
    known = f"{tried}; by the classes with most faults it would have been {blind}"
    yield "how sure", f"no cause is established; {known if share.of else 'no text to other prompts was like it'}"


def _compared(found: TextFinding) -> str:
    if found.right is None:
        return "with nothing: give the model to compare with the right text (--model)"
    n, differs = found.n_right, found.differs_at()
    by = "what bitnet_py computes greedily"
    if differs is None:
        end = "to its end" if found.right.ended else "as far as it was computed"
        return f"with {by}: the same, {end} ({n} tokens)"
    expected, given = (_quoted(text) for text in differs)
    tokens = "1 token is" if n == 1 else f"{n} tokens are"
    where = {
        "at once": f"differs from the first token on: {expected} expected, {given} found",
        "later": f"{tokens} right, then token {n} differs: {expected} expected, {given} found",
        "stops early": f"{tokens} right, then it stops, or was cut; {expected} is next",
        "goes on": f"all {tokens} right, then it goes on where the right text ends: {given}",
    }[str(found.signature.departure)]
    return f"with {by}: {where}"


def _suspect(suspect: Suspect) -> str:
    examples = ", ".join(suspect.faults[:NAMED]) + (", …" if len(suspect.faults) > NAMED else "")
    about = f": {AROUND[suspect.family]}" if suspect.family in AROUND else ""
    return f"{suspect.family}{about}; {len(suspect.faults)} of its {suspect.of} faults ({examples})"


def _passes(departure: str) -> str:
    kinds = {str(name): counts for name, counts in evidence().passes.items()}[departure]
    decode, prefill = kinds.get("decode only", 0), kinds.get("prefill only", 0)
    texts = f"of {sum(kinds.values())} measured texts {DEPARTS[departure]}"
    decoded = f"{decode} are of engines wrong in decoded tokens only"
    return f"{texts}, {decoded}, {prefill} of engines wrong in the prompt's pass only"


def _quoted(text: str) -> str:
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return f'"{cut}"' if cut.isprintable() else f'"{cut.encode("unicode_escape").decode()}"'
