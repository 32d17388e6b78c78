"""Print a receipt of kind ``tokens``: a line per category, the first difference as pieces, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.console import clip, new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.party import names_of
from crossval.receipts.show import show_verdict
from crossval.terms import SIDES, Side


def show_tokens(out: Console, receipt: Receipt) -> None:
    """Print what both tokenizers made of each category, where they first differ, and the verdict."""
    results, names = receipt["results"], names_of(receipt)
    corpus = results["corpus"]
    show_line(
        out,
        f"\n{corpus['n_texts']} texts (corpus {corpus['name']}, {corpus['digest'][:12]}), each as a prompt "
        "(BOS and EOS as the vocabulary asks, special tokens recognised) and as plain text.",
    )
    out.print(_table(results["rows"], names))
    if results["first_difference"] is not None:
        _show_difference(out, results["first_difference"], names)
    total, pieces = results["total"], results["pieces"]
    rates = ", ".join(
        f"{names[side]} {total['n_texts'] / results['elapsed_s'][side]:,.0f} texts/s"
        for side in SIDES
        if results["elapsed_s"][side] > 0
    )
    show_line(out, f"pieces     {pieces['n_equal']} of {pieces['n']} tokens have the same piece")
    show_line(out, f"speed      {rates}")
    compared = total["n_equal"] + total["n_different"]
    refused = f"; refused by both: {total['n_refused']}" if total["n_refused"] else ""
    show_verdict(
        out, receipt["verdict"], f"{total['n_equal']} of {compared} texts have the same token ids{refused}"
    )


def _table(rows: list[Mapping[str, Any]], names: Mapping[Side, str]) -> Table:
    """Return one line per category, both modes together."""
    table = new_table()
    for name in ("category", "texts", "same ids", "different", "refused by both", "by one", "lost"):
        table.add_column(name, justify="left" if name == "category" else "right", overflow="fold")
    for category in dict.fromkeys(row["category"] for row in rows):
        of_it = [row for row in rows if row["category"] == category]
        count = {
            name: sum(row[name] for row in of_it) for name in ("n_texts", "n_equal", "n_different", "n_refused")
        }
        alone = {side: sum(row["n_refused_by"][side] for row in of_it) for side in SIDES}
        lost = {side: sum(row["n_lost"][side] for row in of_it) for side in SIDES}
        table.add_row(
            category,
            str(count["n_texts"]),
            str(count["n_equal"]),
            Text(str(count["n_different"]), "bold red" if count["n_different"] else ""),
            str(count["n_refused"]),
            plain(_by_side(alone, names)),
            plain(_by_side(lost, names)),
        )
    return table


def _by_side(counts: Mapping[Side, int], names: Mapping[Side, str]) -> str:
    return ", ".join(f"{names[side]} {counts[side]}" for side in SIDES if counts[side]) or "0"


def _show_difference(out: Console, first: Mapping[str, Any], names: Mapping[Side, str]) -> None:
    text = bytes.fromhex(first["text"]).decode("utf-8", "backslashreplace")
    where = f"text {first['index']} ({first['category']}), as {first['mode']}"
    show_line(out, f"\nfirst difference: {where}, token {first['at']}: {clip(text, 60)!r}")
    for side in SIDES:
        seen = first["seen"][side]
        if seen["refused"] is not None:
            show_line(out, f"  {names[side]:12} refuses it: {seen['refused']}")
            continue
        shown = " ".join(f"{piece!r}={token}" for piece, token in zip(seen["pieces"], seen["ids"], strict=True))
        show_line(out, f"  {names[side]:12} {seen['n_ids']} tokens, from {first['start']}: {shown}")
