"""A receipt of a model file's weights for people: what was compared, the findings by cause, the verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_py.layout_evidence import MIN_MEAN
from crossval.console import clip, new_table, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict
from crossval.weights import judge
from crossval.weights import receipt as weights_receipt

MAX_SUBJECTS = 3
"""Tensors with the same cause that are shown by name."""


def show_weights(out: Console, receipt: Receipt) -> None:
    """Print the kinds of tensors, the layout that the file shows, findings and verdict."""
    results = receipt["results"]
    if results["checkpoint"]:
        show_line(out, f"checkpoint {', '.join(file['name'] for file in results['checkpoint'])}")
    out.print(_kinds_table(results["rows"]))
    show_line(out, _layout_line(results["layout"]))
    findings = results["findings"]
    if findings:
        out.print(_findings_table(findings))
    show_verdict(out, receipt["verdict"], _summary(receipt))


def _kinds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line per kind of tensor: how many there are, of which type, what their values are like."""
    table = new_table()
    for name in ("tensors", "type", "count", "values", "compared", "different"):
        table.add_column(name, justify="left" if name in ("tensors", "type", "values") else "right", no_wrap=True)
    groups: defaultdict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kind = row["name"].split(".")
        name = f"blk.*.{'.'.join(kind[2:])}" if kind[0] == "blk" and len(kind) > 2 else row["name"]
        groups[name, row["facts"]["type"] if row["facts"] else "missing"].append(row)
    for (name, kind), group in groups.items():
        pairs = [row["compared"] for row in group if row["compared"] is not None]
        different = sum(pair["n_different"] > pair["n_at_ties"] for pair in pairs)
        by = ", ".join(sorted({pair["criterion"] for pair in pairs if pair.get("criterion")}))
        table.add_row(
            clip(name, 40),
            kind,
            str(len(group)),
            _values(group) or by,
            str(len(pairs)),
            str(different or "-"),
        )
    return table


def _values(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the codes and scales of matrices, or the range of other values."""
    facts = [row["facts"] for row in rows if row["facts"] is not None]
    histograms = [one["histogram"] for one in facts if one["histogram"] is not None]
    if histograms:
        counts = [sum(column) for column in zip(*histograms, strict=True)]
        shares = " ".join(f"{count / sum(counts):.1%}" for count in counts[: 4 if counts[3] else 3])
        scales = [one["scale"] for one in facts if one["scale"] is not None]
        if not scales:
            return f"codes {shares}"
        return f"codes {shares}, scale {min(scales):.4g} to {max(scales):.4g}"
    values = [one["values"] for one in facts if one["values"] is not None and one["values"]["min"] is not None]
    if not values:
        return ""
    low, high = min(one["min"] for one in values), max(one["max"] for one in values)
    return (
        f"{low:.4g} to {high:.4g}, RMS {min(o['rms'] for o in values):.4g} to {max(o['rms'] for o in values):.4g}"
    )


def _layout_line(layout: Mapping[str, Any]) -> str:
    means = ", ".join(f"{name} {mean:.3g}" for name, mean in (layout["means"] or {}).items())
    found = layout["established"] or "undetermined"
    return f"layout     {found} by the file alone (needs {MIN_MEAN:g}: {means or 'no norms'})"


def _findings_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line per aspect and cause, with the first sentences."""
    table = new_table()
    table.add_column("wrong", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    table.add_column("where", overflow="fold")
    groups: defaultdict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for one in findings:
        groups[one["level"], one["aspect"], one["cause"]].append(one)
    for (level, aspect, cause), group in groups.items():
        most = len(group) if aspect == "key" else MAX_SUBJECTS
        lines = [f"{one['subject']}: {one['sentence']}" for one in group[:most]]
        if len(group) > most:
            lines.append(f"and {len(group) - most} more")
        table.add_row(aspect if level == "wrong" else f"{aspect} (note)", clip(cause, 40), clip_lines(lines))
    return table


def clip_lines(lines: Sequence[str]) -> str:
    """Return lines made safe for a terminal."""
    return "\n".join(clip(line, 300) for line in lines)


def _summary(receipt: Receipt) -> str:
    coverage, result = receipt["coverage"], weights_receipt.from_json(receipt)
    if not result.has_checkpoint:
        return f"{len(result.rows)} tensors read, compared with no checkpoint (--against)"
    wrong = [one for one in judge.findings(result) if one.level == "wrong"]
    named = sum(one.cause != judge.UNDETERMINED for one in wrong)
    found = f"{len(wrong)} findings, {named} with an established cause" if wrong else "no findings"
    return (
        f"{coverage['compared']} of {coverage['required']} tensors and keys compared with the checkpoint: {found}"
    )
