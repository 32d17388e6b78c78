"""Print the parts that receipts of all kinds share: headline, verdict, notes, and the gate's checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from crossval.console import VERDICT_STYLE, clip, insist, new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.party import WITHOUT_RULES, names_of
from crossval.receipts.policy import GateCheck
from crossval.terms import SIDES, UNREAD

OF_ONE_PROMPT = ("layers", "diff", "greedy")
"""Kinds of receipts about what engines do with a prompt, which may be given as token ids."""


def show_headline(out: Console, receipt: Receipt) -> None:
    """Print model, engines and prompt."""
    model = receipt["model"]
    what = (
        f"vocabulary {model['shape']['vocab_size']}" if model["quantization"] == UNREAD else _shape(model["shape"])
    )
    show_line(out, f"model      {model['file_name']}  sha256 {model['sha256'][:12]}  {what}")
    names = names_of(receipt)
    for side in SIDES:
        if receipt[side]["status"] != "unused":
            show_line(out, f"{side:10} {_engine(receipt[side], names[side])}")
    _show_rules(out, receipt)
    if receipt["kind"] in OF_ONE_PROMPT or (receipt["prompt"]["text"] is not None and receipt["kind"] != "smoke"):
        show_line(out, f"prompt     {prompt_words(receipt['prompt'])}")


def prompt_words(prompt: Mapping[str, Any], limit: int = 60) -> str:
    """Return a prompt in at most ``limit`` characters and how long it is: its text, else its token ids."""
    ids = prompt["token_ids"]
    if not ids:
        return "none"
    text = prompt["text"]
    shown = f"tokens {clip(','.join(map(str, ids)), limit)}" if text is None else repr(clip(text, limit))
    return f"{shown}  {len(ids)} tokens"


def _show_rules(out: Console, receipt: Receipt) -> None:
    """Print by whose rules text was read, unless an engine of March's generation shows it by itself."""
    rules = receipt["tokenizer"].get("rules")
    stating = [
        side
        for side in SIDES
        if receipt[side]["name"] not in WITHOUT_RULES and receipt[side]["numerics"].get("generation")
    ]
    if rules is not None and (rules != "march" or not stating):
        default = "" if stating else " (the default: no engine here has rules of its own)"
        show_line(out, f"tokenizer  rules of bitnet.cpp {rules}{default}")


def _shape(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['n_layers']} layers, dim {shape['dim']}, {shape['n_heads']}/{shape['n_kv_heads']} heads, "
        f"hidden {shape['hidden_dim']}, vocabulary {shape['vocab_size']}"
    )


def _engine(party: Mapping[str, Any], name: str) -> str:
    facts = [name, party["status"]]
    if party["version"]:
        facts.append(f"version {party['version']}")
    if party["source_commit"]:
        facts.append(f"commit {party['source_commit'][:12]}")
    if party["library_digest"] and name != party["name"]:
        facts.append(f"library {party['library_digest'][:12]}")
    if party["compiler"]:
        facts.append(party["compiler"])
    if party["settings"].get("kernel"):
        facts.append(f"kernel {party['settings']['kernel']}")
    if party["numerics"].get("generation") not in (None, "march"):
        facts.append(f"generation {party['numerics']['generation']}")
    if party["numerics"]["simd_width"]:
        facts.append(f"{party['numerics']['simd_width']} lanes")
    return ", ".join(facts)


def show_verdict(out: Console, verdict: str, text: str) -> None:
    """Print the verdict, and in one line what it is based on."""
    style = VERDICT_STYLE.get(verdict, "bold red")
    insist(out, Text.assemble((verdict.upper(), style), f"  {plain(text)}"))


def sides_and_counts(receipt: Receipt) -> str:
    """Return which engines were compared, and how many of the required comparisons were made."""
    names, coverage = names_of(receipt), receipt["coverage"]
    return (
        f"{names['candidate']} against {names['reference']} ({receipt['reference']['status']}): "
        f"{coverage['compared']} of {coverage['required']} comparisons"
    )


def show_unavailable(out: Console, receipt: Receipt) -> None:
    """Print which engine was unavailable."""
    for side in SIDES:
        if receipt[side]["status"] == "unavailable":
            show_line(out, f"{side} unavailable: {receipt[side]['note']}")
    show_verdict(out, receipt["verdict"], sides_and_counts(receipt))


def show_notes(out: Console, receipt: Receipt) -> None:
    """Print the notes, which qualify the verdict."""
    for note in receipt["notes"]:
        show_line(out, f"note: {note}")


def show_checks(out: Console, name: str, checks: Sequence[GateCheck], passed: bool) -> None:
    """Print one receipt's gate checks and whether it passes."""
    table = new_table()
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        waived = Text("-", "dim") if not check.applies else Text("pass", "green")
        state = waived if check.passed else Text("FAIL", "bold red")
        table.add_row(check.name, state, plain(check.detail))
    out.print(table)
    style = "bold green" if passed else "bold red"
    insist(out, Text.assemble(("PASS" if passed else "FAIL", style), f"  {plain(name)}"))
