"""A receipt in plain words: which side is wrong, how that is known, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console

from crossval.audit.show import (
    before,
    cause,
    computes,
    misrecorded,
    place,
    recording_line,
    seen_at,
    segmented,
    what_recorded,
    wrong_line,
)
from crossval.causal import show as causal_show
from crossval.console import show_line
from crossval.examine import arithmetics
from crossval.examine.advice import advice_of, of_graph
from crossval.examine.graph import followed_graph
from crossval.examine.layers_receipt import decisive
from crossval.receipts.file import Receipt
from crossval.receipts.party import names_of
from crossval.receipts.show import show_headline, show_notes
from crossval.repeat import floors_show
from crossval.terms import SIDES, Side

Lines = Iterator[tuple[str, str]]
"""Label and text."""

DEFAULT_PRE = (None, "", "default")
"""Pre-tokenizers that split text in no particular way; llama-bpe models go wrong with them."""

_WRONG_SIDE = {
    "parity": "none: {candidate} and {reference} agree with each other and with the model's definition",
    "candidate_defect": "the candidate: {candidate} is wrong, {reference} does what the model defines",
    "reference_defect": "the reference: {reference} is wrong, {candidate} does what the model defines",
    "shared_deviation": "a shared cause (weights, header, or a ported bug): {candidate} and {reference} agree, "
    "and both differ from the model's definition",
    "both_differ": "both, or what both are given: {candidate} and {reference} are wrong in different ways",
    "divergence": "no operation: each of {candidate} and {reference} is correct given its own inputs, "
    "but they differ",
    "agrees_within": "none as far as was recorded: {candidate} and {reference} agree within a distance",
    "deviates": "none: each of {candidate} and {reference} is correct as it computes, which is not what the model "
    "defines",
    "near_ties": "none: {candidate} and {reference} differ in near ties only",
    "incomplete": "not known: something that had to be compared was not",
}


def show_triage(out: Console, receipt: Receipt) -> None:
    """Print which side is wrong, how that is known, and what to do next."""
    show_headline(out, receipt)
    show_line(out, "")
    for label, text in explain(receipt):
        show_line(out, f"{label:11}  {text}")
    if "causal" in receipt:
        out.print(causal_show.effects_table(receipt["causal"]))
    show_notes(out, receipt)


def explain(receipt: Receipt) -> Lines:
    """Yield the findings of a ``layers`` or ``diff`` receipt as labelled sentences."""
    whole, receipt = receipt, decisive(receipt)
    names = names_of(receipt)
    recorded, graph = misrecorded(receipt), followed_graph(receipt)
    if receipt["verdict"] == "divergence" and segmented(receipt):
        text = "no operation or segment, as far as they were judged: {candidate} and {reference} differ"
        yield "wrong side", text.format(**names)
    elif receipt["verdict"] == "parity" and segmented(receipt):
        yield "wrong side", "none was found: {candidate} and {reference} compute the same".format(**names)
        yield "looked at", advice_of(receipt).meaning
    elif receipt["verdict"] == "incomplete" and recorded:
        yield "wrong side", "the recording: nothing is proven against either engine"
    else:
        text = _WRONG_SIDE[receipt["verdict"]].format(**names)
        yield "wrong side", text if graph is None else of_graph(text)
    if whole is not receipt:
        yield "seen in", "the default run only, with flash attention; what was captured without it passes"
    if graph is not None:
        yield "held to", f"the graph that the reference computes, not the model: it has {graph}"
    if receipt["reference"]["status"] == "unavailable":
        yield "what to do", receipt["reference"]["note"] or "get a reference"
        return
    yield "tokens", _tokens(receipt)
    yield "output", _output(receipt)
    for label, side, text in computes(receipt):
        yield label, f"{side} {names[side]}: {text}"
    for side in SIDES:
        first = (receipt["audit"][side] or {}).get("first_guilty")
        if first is not None:
            yield "first wrong", f"{side} {names[side]}: {wrong_line(first)}"
    for side, one in recorded:
        yield "recorded", f"{side} {names[side]}: {recording_line(one)}"
    different, inexact = arithmetics.stated(receipt), receipt["first_inexact"]
    if different is not None and inexact is not None:
        yield "arithmetic", different
        why = arithmetics.at(receipt, inexact)
        if why is not None:
            yield "", f"bits need not be equal: {why}"
    for found in receipt["diagnosis"]:
        yield "why", f"{found['party']}: {cause(found)}"
    yield from floors_show.lines(whole)
    if "causal" in whole:
        yield from (("causal", text) for text in causal_show.conclusions(whole))
    for number, step in enumerate(_steps(receipt, names), 1):
        yield "what to do" if number == 1 else "", f"{number}. {step}"


def _tokens(receipt: Receipt) -> str:
    n_tokens, agree = len(receipt["prompt"]["token_ids"]), receipt["tokenizer"]["engines_agree"]
    if agree is None:
        return f"{n_tokens}; only one engine could tokenize, so the tokenizers were not compared"
    return f"both read the prompt as the same {n_tokens}" if agree else "the tokenizers disagree (see the notes)"


def _output(receipt: Receipt) -> str:
    status, share = receipt["parity"]["status"], receipt["parity"]["logits_exact_match_rate"]
    if status == "parity":
        return "the same from both: " + ("bit-identical" if share == 1.0 else "equal within rounding")
    first = receipt["first_divergence"]
    if first is not None:
        where = f"{seen_at(receipt, first)} (pass {first['pass_index']}, {first['pass_kind']})"
        return f"differs by more than rounding from {where} on"
    return "differs in the tokens it is made from" if status == "divergence" else "not compared completely"


def _steps(receipt: Receipt, names: Mapping[Side, str]) -> Iterator[str]:
    """Yield what to do next, most promising first."""
    verdict = receipt["verdict"]
    places = {found["party"]: place(found) for found in receipt["diagnosis"]}
    if verdict == "parity":
        yield "If the text is bad, it is the model or how it is used. crossval smoke shows whether it makes sense."
        yield from _configuration(receipt)
        yield "Check the conversion of the weights, the end-of-text token and the sampling settings."
    elif verdict == "candidate_defect":
        yield f"Fix {places['candidate']} in {names['candidate']}; {before(receipt['audit']['candidate'])}."
        yield from _reproduce(receipt)
        yield "Then run this again: it may hide another error."
    elif verdict == "reference_defect":
        yield f"Do not change {names['candidate']} to match {names['reference']}."
        yield f"Report {places['reference']} to its authors, with the reproducer."
        yield from _reproduce(receipt)
        yield "Until it is fixed, compare with --reference spec, or with another build."
    elif verdict == "shared_deviation":
        yield "Suspect the file first: weights converted wrongly, a wrong value in its header."
        yield "Then a bug that was ported from one engine to the other, in the operation above."
        yield from _reproduce(receipt)
    elif verdict == "both_differ":
        yield "Check what both are given: tokenizer and template, header values, the layout of the packed weights."
        yield from _configuration(receipt)
        yield from _reproduce(receipt)
    elif verdict == "agrees_within":
        yield "Record the quantised tensors of the layers named in the audit, then run this again."
    elif verdict == "deviates":
        yield advice_of(receipt).next_step
    elif verdict == "divergence" and arithmetics.stated(receipt) is not None:
        yield advice_of(receipt).next_step
        yield "crossval layers --full compares every operation of every layer directly."
    elif verdict == "divergence":
        inside = ", or inside a segment: record every tap" if segmented(receipt) else ""
        yield (
            "Look at what comes before the first operation or lives between passes: tokens, positions, KV cache"
            f"{inside}."
        )
        yield from _configuration(receipt)
        yield "crossval layers --full compares every operation of every layer directly."
    elif misrecorded(receipt):
        yield from (f"Record {what_recorded(one)} again: {one['remedy']}." for _, one in misrecorded(receipt))
    else:
        yield "Record what is missing, or run both engines live."
        yield from (f"Not compared: {skip['why']}." for skip in receipt["coverage"]["skipped"][:1])


def _reproduce(receipt: Receipt) -> Iterator[str]:
    for found in receipt["diagnosis"][:1]:
        yield f"See the operation alone, without any engine: {found['command']}"


def _configuration(receipt: Receipt) -> Iterator[str]:
    """Yield what in tokenizer and template looks odd."""
    if receipt["tokenizer"]["engines_agree"] is False:
        yield "Make the tokenizers agree first: crossval's notes name the first token that differs."
    pre = receipt["tokenizer"]["pre"]
    if pre in DEFAULT_PRE:
        yield (
            f"The file's tokenizer.ggml.pre is {pre or 'missing'}: text is split in the default way, which is "
            "wrong for models with a llama-bpe vocabulary."
        )
    if receipt["prompt"]["template"] == "raw":
        yield "The prompt was given raw; a chat model needs its template (--template bitnet or llama3)."
