"""A greedy receipt for people: tables of prompts and steps, and what tokens, logits and audits prove together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.audit import products
from crossval.audit import show as audit_show
from crossval.audit.checks import AuditVerdict
from crossval.compare import rows as compare
from crossval.compare.receipt import fraction_equal
from crossval.compare.rows import GreedyPrompt, TapRow
from crossval.console import at_most, clip, new_table, percent, show_line
from crossval.examine import greedy_receipt, locations
from crossval.examine.advice import show_conclusion
from crossval.examine.greedy_receipt import SAME_ARITHMETIC
from crossval.examine.greedy_verdict import is_exact, joint
from crossval.examine.layers_receipt import within
from crossval.examine.verdict import ADVICE, Advice, Verdict
from crossval.model import taps
from crossval.model.taps import OPTIONAL_TAPS
from crossval.passes import n_after
from crossval.receipts.file import Receipt
from crossval.repeat.cells import STYLE, cell, number
from crossval.terms import SIDES, Side

MAX_PROMPT_LINES = 12
MAX_NAMED = 4
"""Missing taps that are named."""


def show_greedy(out: Console, receipt: Receipt) -> None:
    """Print a line per prompt (of many: per prompt that differs), one per range of steps, and what was audited."""
    result = greedy_receipt.from_json(receipt).result
    everything, policy = list(enumerate(result.prompts)), result.policy
    listed = everything
    most = at_most(out, MAX_PROMPT_LINES)
    if len(everything) > most:
        listed = [one for one in everything if compare.decide_greedy([one[1]], policy) != "parity"]
    show_line(out, "\nToken by token; '=': all bits of the logits are equal.")
    if listed:
        out.print(greedy_table(listed[:most]))
    if len(listed) > most:
        show_line(out, f"{len(listed) - most} more prompts differ or are incomplete: see the receipt.")
    if len(everything) > len(listed):
        show_line(out, f"{len(everything) - len(listed)} of {len(everything)} prompts agree and are not listed.")
    if any(prompt.steps for prompt in result.prompts):
        show_line(out, "\nStep by step, over all prompts; both engines read the same tokens.")
        out.print(steps_table(result.prompts))
    if result.from_journal:
        show_line(out, f"from the journal: {result.from_journal} of {len(everything)} prompts")
    if result.audited:
        n_decoded = n_after(result.audited, len(receipt["prompt"]["token_ids"]))
        plural = "" if n_decoded == 1 else "s"
        show_line(out, f"\nAudited: the first prompt's pass and {n_decoded} decoded token{plural}.")
        audit_show.show_audits(out, receipt)
        locations.show_guilty_layers(out, receipt)
    for index, alone in greedy_receipt.further_alone(receipt).items():
        show_line(out, f"\nAudited, too: prompt {index}, up to its last token that differs.")
        audit_show.show_audits(out, alone)
        locations.show_guilty_layers(out, alone)
    parity, counts = receipt["parity"], ""
    if parity["exact_match_rate"] is not None:
        counts = f", {percent(parity['exact_match_rate'])} of the tokens equal"
        counts += f", {percent(parity['logits_exact_match_rate'])} of the logits bit-equal"
    show_conclusion(out, receipt, counts, conclude(receipt), _where, lambda one: f"prompt {one['prompt_index']}")


def _where(receipt: Receipt, step: Mapping[str, Any]) -> str:
    ours, theirs = step["candidate_token"], step["reference_token"]
    chosen = f"logits, both choose {ours}" if ours == theirs else f"candidate {ours}, reference {theirs}"
    why = f": {step['explanation']}" if step["explanation"] else ""
    return f"prompt {step['prompt_index']}, step {step['step']}: {chosen}{why}"


def steps_table(prompts: Sequence[GreedyPrompt]) -> Table:
    """Return exact-match rates over all prompts, one line per range of steps, each as long as all before it."""
    table = new_table()
    names = ("equal tokens", "fraction", "bit-equal logits", "fraction", "bit-equal values")
    for name in ("", "compared", *names, "worst logits"):
        left = name in ("", "worst logits")
        table.add_column(name, no_wrap=True, justify="left" if left else "right")
    length = max((len(prompt.steps) for prompt in prompts), default=0)
    start, stop = 0, 1
    while start < length:
        steps = [step for prompt in prompts for step in prompt.steps[start:stop]]
        rows = [step.logits for step in steps]
        tokens = sum(
            step.candidate_token is not None for step in steps if step.candidate_token == step.reference_token
        )
        logits = sum(compare.row_status(row) == "equal" for row in rows)
        last = min(stop, length) - 1
        table.add_row(
            f"step {start}" if last == start else f"steps {start}-{last}",
            str(len(steps)),
            str(tokens),
            percent(tokens / len(steps)),
            str(logits),
            percent(logits / len(steps)),
            percent(fraction_equal(rows)),
            _worst_cell(rows),
        )
        start, stop = stop, 2 * stop
    return table


def _worst_cell(rows: Sequence[TapRow]) -> Text:
    return cell([(i, "") for i in range(len(rows))], {(i, ""): row for i, row in enumerate(rows)}, set())


def greedy_table(prompts: Sequence[tuple[int, GreedyPrompt]]) -> Table:
    """Return one line per numbered prompt: tokens that match, first difference, how far the logits are apart."""
    table = new_table()
    for name in ("#", "prompt", "equal tokens", "forced", "first difference", "logits", "least margin"):
        table.add_column(
            name, no_wrap=True, justify="right" if name in ("#", "equal tokens", "forced") else "left"
        )
    for index, prompt in prompts:
        rows = [step.logits for step in prompt.steps]
        margins = [step.reference_margin for step in prompt.steps if step.reference_margin is not None]
        table.add_row(
            str(index),
            clip(",".join(map(str, prompt.prompt_ids)) if prompt.text is None else prompt.text, 28),
            f"{prompt.free_running_matches}/{prompt.steps_required}",
            percent(prompt.teacher_forced_agreement),
            _first_difference(prompt),
            _worst_cell(rows) if rows else Text("none", STYLE["skipped"]),
            number(min(margins, default=None), ".3g"),
        )
    return table


def _first_difference(prompt: GreedyPrompt) -> Text:
    if prompt.first_divergence is None:
        return Text("-")
    step = prompt.steps[prompt.first_divergence]
    within = compare.row_status(step.logits) in ("equal", "within")
    kind = "near tie" if step.near_tie else f"logits {'within' if within else 'beyond'} bounds"
    return Text(f"step {step.step}: {step.candidate_token} for {step.reference_token}, {kind}", STYLE["diverged"])


def conclude(receipt: Receipt) -> Advice:
    """Return what a greedy receipt proves, in a sentence, and what to do next."""
    verdict: Verdict = receipt["verdict"]
    if receipt["parity"]["exact_match_rate"] is None:
        return ADVICE[verdict]
    found = greedy_receipt.from_json(receipt)
    audits = joint(found.audits or {}, found.further)
    head = f"{_tokens(receipt)}; {_logits(receipt)}"
    if "guilty" in audits.values():
        guilty = [side for side in SIDES if audits[side] == "guilty"]
        if verdict not in ("incomplete", "divergence"):
            return Advice(f"{head}. {ADVICE[verdict].meaning}", ADVICE[verdict].next_step)
        whose = "Both engines' arithmetic is wrong."
        if len(guilty) == 1:
            whose = f"The {guilty[0]}'s arithmetic is wrong; the other's is not known."
        more = "" if len(guilty) > 1 else f"; {_what_to_record(receipt, audits)}"
        return Advice(f"{head}. {whose}", f"Fix the operation named above{more}.")
    if verdict == "deviates":
        deviating = "; ".join(products.words(receipt))
        step = ADVICE[verdict].next_step.replace(products.FLAG, products.flags(receipt))
        return Advice(f"{head}. {ADVICE[verdict].meaning} That is: {deviating}.", step)
    if verdict == "near_ties":
        return Advice(f"{head}. {ADVICE[verdict].meaning}", ADVICE[verdict].next_step)
    if verdict == "parity":
        return Advice(f"{head}; {_proof(receipt, audits)}.", ADVICE[verdict].next_step)
    if receipt["parity"]["status"] == "divergence":
        return Advice(f"{head}; {_proof(receipt, audits)}.", _why_differ(receipt, audits))
    if receipt["parity"]["status"] == "incomplete":
        return Advice(f"{head}; not all steps were compared.", ADVICE["incomplete"].next_step)
    if verdict == "agrees_within":
        agrees = f"the arithmetic agrees with the model's definition within {within(receipt):.2g}"
        return Advice(f"{head}; {agrees}; not checked below that.", _sentence(_what_to_record(receipt, audits)))
    agree = "logits bit-equal" if is_exact(receipt["parity"]) else "tokens agree"
    checked = "not audited" if is_exact(receipt["parity"]) else "not checked"
    return Advice(f"{agree}; arithmetic {checked}.", _sentence(_what_to_record(receipt, audits)))


def _tokens(receipt: Receipt) -> str:
    return f"{percent(receipt['parity']['exact_match_rate'])} of the tokens equal"


def _logits(receipt: Receipt) -> str:
    parity = receipt["parity"]
    if is_exact(parity):
        return "all logits are bit-equal"
    if (receipt["thresholds"] or {}).get("policy") == "same":
        return SAME_ARITHMETIC
    statuses = [step["logits"]["status"] for prompt in receipt["results"]["prompts"] for step in prompt["steps"]]
    within = all(status in ("equal", "within") for status in statuses)
    return "the logits agree within their bounds" if within else "the logits differ beyond their bounds"


def _proof(receipt: Receipt, audits: Mapping[Side, AuditVerdict]) -> str:
    clean = [side for side in SIDES if audits[side] == "clean"]
    if len(clean) == len(SIDES):
        return "every operation of both engines is correct in the passes that were audited"
    if clean:
        return f"every operation of the {clean[0]} is correct in the passes that were audited"
    return "arithmetic not audited" if is_exact(receipt["parity"]) else "arithmetic not checked"


def _why_differ(receipt: Receipt, audits: Mapping[Side, AuditVerdict]) -> str:
    if set(audits.values()) == {"clean"}:
        if (receipt["thresholds"] or {}).get("policy") == "same":
            return "One of them does not round as it states, or differs in passes that were not audited."
        return "Run crossval layers with the prompt named below and --decode as far as its step."
    return _sentence(_what_to_record(receipt, audits))


def _what_to_record(receipt: Receipt, audits: Mapping[Side, AuditVerdict]) -> str:
    """Return what would let the audit be made, or be complete."""
    if all((receipt["audit"] or {}).get(side) is None for side in SIDES):
        return "run it again without --no-audit to check the arithmetic of both"
    missing = [side for side in SIDES if audits[side] not in ("clean", "guilty")]
    names = " and of the ".join(missing)
    lacking = ", ".join(dict.fromkeys(name for side in missing for name in _lacking(receipt, side)))
    which = f" ({lacking})" if lacking else ""
    return f"record every tap of the {names}{which} in the prompt's pass and in one decoded token, or run it live"


def _lacking(receipt: Receipt, side: Side) -> list[str]:
    """Return which taps an engine did not give, by their names in the model's graph, the first few."""
    audit = (receipt["audit"] or {}).get(side)
    if audit is None:
        return []
    passes = len(receipt["results"].get("passes", ()))
    given = {row["tap"] for row in audit["rows"] if row["n_passes"] - row["n_unchecked"] == passes}
    absent = OPTIONAL_TAPS - {taps.parse(row["tap"]).tap for row in _rows(receipt)}
    missing = [name for name in taps.all_taps(receipt["model"]["shape"]["n_layers"]) if name not in given]
    kinds = [kind for kind in dict.fromkeys(taps.parse(name).tap for name in missing) if kind not in absent]
    return kinds if len(kinds) <= MAX_NAMED else [*kinds[:MAX_NAMED], "…"]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _rows(receipt: Receipt) -> list[Mapping[str, Any]]:
    """Return the audit rows of both engines."""
    return [row for audit in (receipt["audit"] or {}).values() if audit is not None for row in audit["rows"]]
