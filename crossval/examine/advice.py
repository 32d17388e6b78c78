"""What a verdict means and what to do next, in no more words than the audits allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from crossval.audit import extent, precision, products, summary
from crossval.audit.show import before, counts, misrecorded, segmented
from crossval.console import at_most, show_line
from crossval.examine import arithmetics, locations
from crossval.examine.graph import followed_graph
from crossval.examine.verdict import ADVICE, Advice
from crossval.model.taps import INPUT_TAPS
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict, sides_and_counts
from crossval.terms import LOGITS, SIDES, Side

MAX_SKIPS_SHOWN = 5

_RECORD_ANEW = Advice(
    "Nothing is proven against either engine: a recording is wrong, and everything around it passes without it.",
    "Change the recording as described above, record again, and rerun this.",
)


def advice_of(receipt: Receipt) -> Advice:
    """Return what the verdict means and what to do next, no more than the audits show."""
    if receipt["verdict"] == "incomplete" and misrecorded(receipt):
        return _RECORD_ANEW
    advice, limits = _advice(receipt), []
    graph = followed_graph(receipt)
    if graph is not None:
        advice = replace(advice, meaning=of_graph(advice.meaning))
        limits.append(
            f" That graph is not the model: it has {graph}. Whether either engine computes the model is not shown."
        )
    lanes = [side for side in SIDES if (receipt[side]["numerics"] or {}).get("binary16_sums")]
    if lanes and receipt["verdict"] in ("parity", "divergence", *_CORRECT_SIDE):
        limits.append(
            f" The {' and the '.join(lanes)} adds products in binary16: of its logits, and of attention in passes "
            "of one token, this shows only what such sums leave (docs/audit.md)."
        )
    deviating = products.words(receipt)
    if deviating:
        other = receipt["verdict"] != "deviates"
        limits.append(f" {'Beside that' if other else 'That is'}: {'; '.join(deviating)}.")
        if not other:
            step = advice.next_step.replace(products.FLAG, products.flags(receipt))
            advice = replace(advice, next_step=step)
            limits.append(" How far the engines are apart shows that, and nothing else was looked for in it.")
    precise = precision.within(receipt)
    if precise:
        limits.append(f" This is seen at the precision of {precise} only.")
    other = _CORRECT_SIDE.get(receipt["verdict"])
    if other and summary.audit_verdict((receipt["audit"] or {}).get(other)) == "within":
        limits.append(f" Of the {other} this is shown only within the distance stated.")
    return replace(advice, meaning=advice.meaning + "".join(limits))


def of_graph(text: str) -> str:
    """Return a sentence about the model's definition as one about the reference's graph."""
    for said, instead in (
        ("the specification", "the graph that the reference computes"),
        ("the model's definition", "the graph that the reference computes"),
        ("the model defines", "the graph defines that the reference computes"),
    ):
        text = text.replace(said, instead)
    return text


_CORRECT_SIDE = {"candidate_defect": "reference", "reference_defect": "candidate"}
"""Verdict -> the side that it states is correct."""


def _advice(receipt: Receipt) -> Advice:
    verdict, audits = receipt["verdict"], receipt["audit"] or {}
    advice = ADVICE[verdict]
    if verdict == "incomplete":
        return _little_recorded(receipt) or advice
    different = arithmetics.stated(receipt)
    if verdict == "divergence" and different is not None:
        inside = "operation or segment" if segmented(receipt) else "operation"
        return Advice(
            f"The engines differ from each other by more than two arithmetics of one model were seen to, but "
            f"every {inside} of each is within its bounds given its own inputs. They state different arithmetic "
            f"({different}).",
            "Compare each with an engine of its own arithmetic: bitnet_py takes over what the other states. "
            "If bits are equal then, int8 activations amplify the different rounding; if not, look at the state: "
            "tokens, positions, KV cache.",
        )
    if verdict == "parity" and segmented(receipt):
        judged = [f"{side}: {counts(audits[side])} within their bounds" for side in SIDES]
        agree = "Both engines agree with each other, and with the specification as far as they were checked"
        return replace(advice, meaning=f"{agree}: {'; '.join(judged)}.")
    if verdict == "divergence" and segmented(receipt):
        return Advice(
            "The engines differ from each other, but every operation or segment of each is within its bounds "
            "given its own inputs.",
            f"{advice.next_step.rstrip('.')}, or inside a segment: record every tap to look into it.",
        )
    if verdict == "candidate_defect" and (audits.get("candidate") or {}).get("first_guilty"):
        first = audits["candidate"]["first_guilty"]
        what = "the operation named above" if first["n_ops"] == 1 else f"the error in {extent.where(first)},"
        what = _named(receipt, "candidate") or what
        return replace(advice, next_step=f"Fix {what} in the candidate; {before(audits['candidate'])}.")
    if verdict == "reference_defect" and (audits.get("reference") or {}).get("first_guilty"):
        first = audits["reference"]["first_guilty"]
        if first["n_ops"] > 1:
            step = f"The error is in {extent.where(first)}: find it before you report it."
            named = _named(receipt, "reference")
            if named is not None:
                step = f"Report {named} to the reference's authors."
            return replace(advice, next_step=f"Do not change the candidate. {step}")
    return advice


def _little_recorded(receipt: Receipt) -> Advice | None:
    """Return what traces of logits, or of a pass's last tokens, do not show; None: something else is missing."""
    if receipt["kind"] not in ("layers", "diff"):
        return None
    rows, passes = receipt["results"]["rows"], receipt["results"]["passes"]
    if not rows or any(row["status"] not in ("equal", "within") for row in rows):
        return None
    if {row["tap"] for row in rows} == {LOGITS}:
        return Advice(
            "Only logits were compared, and they agree. An error in any layer that leaves these logits within "
            "their bounds is not seen, and nothing is known of tokens whose logits were not recorded.",
            "Record inp_embd, every l_out and result_norm as well: they find a layer; every tap finds the "
            "operation (docs/trace-format.md).",
        )
    n_tokens = [len(one["token_ids"]) for one in passes]
    inputs = (row for row in rows if row["tap"] in INPUT_TAPS)
    row = next((row for row in inputs if row["rows_compared"] < n_tokens[row["pass_index"]]), None)
    if row is None:
        return None
    index = row["pass_index"]
    return Advice(
        f"What was compared agrees, but of pass {index} only {row['rows_compared']} of {n_tokens[index]} tokens "
        "were recorded. The others feed attention, which therefore could not be checked, and nothing is known of "
        "them.",
        "Record every token of the pass (leave rows out in trace.json).",
    )


def _named(receipt: Receipt, side: Side) -> str | None:
    """Return the cause that was found inside a segment, and where; None: there is none, or it is no segment."""
    found = next((one for one in receipt["diagnosis"] or () if one["party"] == side), None)
    inside = (found or {}).get("segment_ops", [])
    return f"{inside[0]} ({found['name']})" if found is not None and inside else None


def show_conclusion(
    out: Console,
    receipt: Receipt,
    counts: str,
    advice: Advice,
    where: Callable[[Receipt, Mapping[str, Any]], str],
    skip: Callable[[Mapping[str, Any]], str],
) -> None:
    """Print the verdict, what it means and what to do next, where engines first differ, what was not compared.

    ``counts``: shown beside the verdict. ``where`` and ``skip`` name a first difference and a skipped comparison.
    """
    verdict = receipt["verdict"]
    within = precision.within(receipt) if verdict in ("parity", "deviates") else None
    text = sides_and_counts(receipt) + ("" if within is None else f", within {within}")
    if followed_graph(receipt) is not None:
        text += ", held to the reference's graph, not to the model"
    show_verdict(out, verdict, text + counts)
    show_line(out, f"meaning    {advice.meaning}")
    show_line(out, f"next step  {advice.next_step}")
    first, inexact = receipt["first_divergence"], receipt["first_inexact"]
    if first is not None:
        show_line(out, f"first divergence: {where(receipt, first)}")
        locations.show_relations(out, receipt)
    if inexact is not None and inexact != first:
        show_line(out, f"first inexact bits: {where(receipt, inexact)}")
    different = arithmetics.stated(receipt)
    if inexact is not None and different is not None:
        show_line(out, f"arithmetic {different}")
        why = arithmetics.at(receipt, inexact) if "tap" in inexact else None
        if why is not None:
            show_line(out, f"           bits need not be equal: {why}")
    skipped = receipt["coverage"]["skipped"]
    most = at_most(out, MAX_SKIPS_SHOWN)
    for one in skipped[:most]:
        show_line(out, f"not compared: {skip(one)}: {one['why']}")
    if len(skipped) > most:
        show_line(out, f"not compared: {len(skipped) - most} more")
