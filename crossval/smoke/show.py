"""Print a smoke receipt: counts per family, the verdict, and the first wrong answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.console import at_most, clip, new_table, percent, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict
from crossval.smoke import answers
from crossval.smoke import receipt as smoke_receipt
from crossval.smoke.answers import Answer

MAX_WRONG_SHOWN = 10
_CLASS_STYLE = {"correct": "green", "coherent": "yellow", "garbled": "bold red"}


def show_smoke(out: Console, receipt: Receipt) -> None:
    """Print the counts of every engine, the verdict and wrong answers."""
    results = receipt["results"]
    suite = results["suite"]
    show_line(
        out,
        f"suite      {suite['name']}, {suite['n_prompts']} prompts, answers of up to "
        f"{receipt['settings']['n_steps']} tokens, template {receipt['prompt']['template']}",
    )
    for counts in results["summary"]["engines"]:
        show_line(out, f"\n{_name(receipt, counts['engine'])}")
        out.print(counts_table(counts))
    _show_verdict(out, receipt)


def _name(receipt: Receipt, side: str) -> str:
    return f"{side} {receipt[side]['name']}"


def counts_table(counts: Mapping[str, Any]) -> Table:
    """Return one line per family and one for all: correct, coherent, garbled; correct among seen and unseen."""
    table = new_table()
    table.add_column("family", no_wrap=True)
    for name in ("prompts", "correct", "coherent", "garbled", "seen", "unseen"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = list(counts["families"]) if len(counts["families"]) > 1 else []
    for line in [*lines, {**counts, "family": "all"}]:
        total = line["all"]
        table.add_row(
            clip(line["family"], 40),
            str(total["n_prompts"]),
            f"{total['correct']} {percent(total['correct'] / total['n_prompts']):>8}",
            *(
                Text(str(total[kind]), _CLASS_STYLE[kind] if total[kind] else "")
                for kind in ("coherent", "garbled")
            ),
            *(_share(line[part]) for part in ("seen", "unseen")),
        )
    return table


def _share(counts: Mapping[str, int]) -> str:
    return f"{counts['correct']}/{counts['n_prompts']}" if counts["n_prompts"] else "-"


def _show_verdict(out: Console, receipt: Receipt) -> None:
    summary, verdict = receipt["results"]["summary"], receipt["verdict"]
    need = receipt["thresholds"]["min_correct"]
    parts = [
        f"{_name(receipt, one['engine'])}: {one['all']['correct']} of {one['all']['n_prompts']} correct"
        for one in summary["engines"]
    ]
    show_verdict(out, verdict, "; ".join(parts) + f" ({need['correct']}/{need['of']} required)")
    texts = summary["texts"]
    if texts is not None:
        first = "" if texts["first_unequal"] is None else f"; first different: {texts['first_unequal']}"
        show_line(out, f"texts equal: {texts['equal']} of {texts['compared']}{first}")
    _show_wrong(out, receipt)


def _show_wrong(out: Console, receipt: Receipt) -> None:
    """Print the first wrong answers; an answer that both engines give is shown once."""
    result = smoke_receipt.from_json(receipt)
    wrong: dict[tuple[str, str, str], tuple[Answer, list[str]]] = {}
    for answer, row in zip(result.answers, receipt["results"]["rows"], strict=True):
        if row["class"] != "correct":
            key = (answer.prompt.id, answer.text, row["class"])
            wrong.setdefault(key, (answer, []))[1].append(answer.side)
    most = at_most(out, MAX_WRONG_SHOWN)
    for (name, _, kind), (answer, sides) in list(wrong.items())[:most]:
        who = "" if len(result.sides) == 1 else "both, " if len(sides) == 2 else f"{sides[0]}, "
        show_line(out, f"wrong: {who}{name}: {_quoted(answer, kind, result.special_ids)}")
    if len(wrong) > most:
        show_line(out, f"wrong: {len(wrong) - most} more (all are in the receipt)")


def _quoted(answer: Answer, kind: str, special_ids: tuple[int, ...]) -> str:
    prompt = answer.prompt
    expected = (
        f"'{clip(prompt.answer, 40)}'" if prompt.answer is not None else f"/{clip(prompt.pattern or '', 40)}/"
    )
    why = answers.why_garbled(answer, special_ids) if kind == "garbled" else None
    return f"'{clip(prompt.prompt, 60)}' -> '{clip(answer.text, 40)}', expected {expected}, {kind}" + (
        f": {why}" if why else ""
    )
