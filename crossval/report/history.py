"""Receipts over time: one line each, and what changed since the last one of the same comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from crossval.audit import summary
from crossval.console import VERDICT_STYLE, new_table, percent, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import OF_ONE_PROMPT

if TYPE_CHECKING:
    import pandas as pd

SAME = ("kind", "model", "prompt", "reference")
"""Receipts that agree in these are of one comparison at different times."""
COLUMNS = (
    "created_at",
    "receipt",
    *SAME,
    "candidate",
    "version",
    "verdict",
    "equal",
    "worst_ratio",
    "decode_ratio",
)


def table(receipts: Sequence[tuple[str, Receipt]]) -> pd.DataFrame:
    """Return one row per receipt, oldest first.

    Columns: ``COLUMNS``, and ``change``: what differs from the receipt before it of the same comparison
    (verdict, fraction of equal results), empty where nothing does or there is none. ``equal`` is the kind's
    exact-match rate, ``worst_ratio`` the candidate's largest error over its bound, ``decode_ratio`` the median
    speed beside the reference (``bench``).
    """
    import pandas as pd  # takes half a second, which no command should pay for

    made: pd.DataFrame = pd.DataFrame([_row(name, receipt) for name, receipt in receipts], columns=list(COLUMNS))
    made = made.sort_values(["created_at", "receipt"], kind="stable").reset_index(drop=True).assign(change="")
    for _, group in made.groupby(list(SAME), sort=False):
        for before, after in zip(group.index, group.index[1:], strict=False):
            made.loc[after, "change"] = _change(made.loc[before].to_dict(), made.loc[after].to_dict())
    return made


def _row(name: str, receipt: Receipt) -> dict[str, Any]:
    rows = ((receipt["audit"] or {}).get("candidate") or {}).get("rows", ())
    ratios = [row.ratio for row in map(summary.row_from_json, rows) if row.ratio is not None]
    decode = receipt["results"].get("measures", {}).get("decode", {}).get("ratio")
    return {
        "created_at": receipt["created_at"],
        "receipt": name,
        "kind": receipt.kind,
        "model": f"{receipt['model']['file_name']} {receipt['model']['sha256'][:8]}",
        "prompt": _prompt(receipt),
        "reference": receipt["reference"]["name"],
        "candidate": receipt["candidate"]["name"],
        "version": receipt["candidate"]["source_commit"] or receipt["candidate"]["version"] or "",
        "verdict": receipt.verdict,
        "equal": receipt["parity"]["exact_match_rate"],
        "worst_ratio": max(ratios, default=None),
        "decode_ratio": None if decode is None else decode["median"],
    }


def _prompt(receipt: Receipt) -> str:
    """Return what tells prompts apart: the text, or the token ids that were given in its place."""
    text, ids = receipt["prompt"]["text"], receipt["prompt"]["token_ids"]
    return str(text or (",".join(map(str, ids)) if receipt.kind in OF_ONE_PROMPT else ""))


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    changes = []
    if before["verdict"] != after["verdict"]:
        changes.append(f"{before['verdict']} → {after['verdict']}")
    if _rate(before) != _rate(after):
        changes.append(f"equal {_rate(before)} → {_rate(after)}")
    return ", ".join(changes)


def _rate(row: Mapping[str, Any]) -> str:
    return "-" if row["equal"] is None or row["equal"] != row["equal"] else percent(float(row["equal"]))


def show(out: Console, made: pd.DataFrame) -> None:
    """Print the table, and how many comparisons changed."""
    shown = new_table()
    for title in ("written", "receipt", "candidate", "reference", "verdict", "equal", "change"):
        shown.add_column(title, overflow="fold", justify="right" if title == "equal" else "left")
    for row in made.to_dict("records"):
        shown.add_row(
            str(row["created_at"])[:10],
            plain(str(row["receipt"])),
            plain(f"{row['candidate']} {str(row['version'])[:12]}"),
            plain(str(row["reference"])),
            Text(str(row["verdict"]), VERDICT_STYLE.get(str(row["verdict"]), "bold red")),
            _rate({str(name): value for name, value in row.items()}),
            str(row["change"]),
        )
    out.print(shown)
    n_changed = int((made["change"] != "").sum())
    show_line(out, f"{len(made)} receipts, {made.groupby(list(SAME)).ngroups} comparisons, {n_changed} changes")
