"""What changed between two snapshots, for people: operation by operation, and around the engine."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console

from crossval.compare.changes import Changes, OpChange
from crossval.console import new_table, plain, show_line
from crossval.examine.environment import Facts, differences, same_groups, unstated

DIGEST = re.compile(r"[0-9a-f]{40,64}")
SHOWN_DIGITS = 12


def show_changes(out: Console, found: Changes, names: Sequence[str]) -> None:
    """Print the list per operation; ``names``: of the two snapshots."""
    before, after = names
    show_line(out, f"\nWhat changed from {before} to {after}, operation by operation, over all layers and passes.")
    if found.held != (found.n_passes, found.n_passes):
        held = f"{before} holds {found.held[0]}, {after} {found.held[1]}"
        show_line(out, f"compared: the first {found.n_passes} passes, which both were fed alike; {held}")
    table = new_table()
    for index, title in enumerate(("op", "equal bits", "within floor", "within bounds", "beyond", "largest")):
        table.add_column(title, justify="right" if 0 < index < 5 else "left", no_wrap=True)
    for one in found.ops:
        counts = (one.equal, one.within_floor, one.within, one.beyond)
        table.add_row(one.op, *(str(count) if count else "-" for count in counts), _largest(one))
    out.print(table)
    for name, ops in zip(names, found.only, strict=True):
        if ops:
            show_line(out, f"not compared: {', '.join(ops)}, which only {name} holds")
    if not found.ops:
        show_line(out, "nothing was compared: the traces share no tensor of a pass that both were fed alike")
    elif found.first is None:
        show_line(out, "first changed: none, every value that both hold is bit-identical")
    else:
        where = f"{found.first.tap} in pass {found.first.pass_index} ({found.first.pass_kind})"
        show_line(out, f"first changed: {where}; all before it that both hold is bit-identical")


def _largest(one: OpChange) -> str:
    row = one.largest
    if row is None:
        return ""
    size = "not comparable" if row.nmse is None else f"NMSE {row.nmse:.1e}"
    size += "" if row.max_abs is None else f", {row.max_abs:.1e} apart"
    return f"{size}, {row.tap} pass {row.pass_index}"


def show_environment(out: Console, before: Facts, after: Facts, names: Sequence[str]) -> None:
    """Print what differs around two results, what is the same, and what neither states."""
    found = differences(before, after)
    if found:
        table = new_table()
        for title in ("", "fact", *names):
            table.add_column(plain(title), overflow="fold")
        group = None
        for one in found:
            row = (one.field, one.before, one.after)
            table.add_row("" if one.group == group else one.group, *map(_cell, row))
            group = one.group
        out.print(table)
    else:
        show_line(out, "every stated fact is the same")
    same = same_groups(before, after)
    if same and found:
        show_line(out, f"the same: {', '.join(same)}")
    missing = unstated(before, after)
    if missing:
        show_line(out, f"stated by neither, so nothing is known: {', '.join(missing)}")


def _cell(text: str) -> str:
    """Return a value on one line; of a digest its beginning."""
    return plain(text[:SHOWN_DIGITS] + "…" if DIGEST.fullmatch(text) else text)
