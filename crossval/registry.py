"""The kinds of receipts, one row each. Imported by the command line and the Python API only.

To add a kind: a package that describes its receipts (``receipts.kind.Kind``) and shows them, the definition of its
results in ``schemas/receipt.v1.schema.json``, and a row here.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from crossval.bench.receipt import BENCH
from crossval.bench.show import show_bench
from crossval.examine.greedy_receipt import GREEDY
from crossval.examine.greedy_show import show_greedy
from crossval.examine.layers_receipt import DIFF, LAYERS
from crossval.examine.layers_show import show_layers
from crossval.receipts import gate
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Kind
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.show import show_headline, show_notes, show_unavailable
from crossval.repeat.metamorphic.receipt import METAMORPHIC
from crossval.repeat.metamorphic.show import show_metamorphic
from crossval.report import pages
from crossval.score.receipt import SCORE
from crossval.score.show import show_score
from crossval.selftest.receipt import SELFTEST
from crossval.selftest.show import show_selftest
from crossval.smoke.receipt import SMOKE
from crossval.smoke.show import show_smoke
from crossval.tokens.receipt import TOKENS
from crossval.tokens.show import show_tokens
from crossval.weights.receipt import WEIGHTS
from crossval.weights.show import show_weights


@dataclass(frozen=True)
class Entry:
    """A kind of receipt, and the function that prints its contents, without headline and notes."""

    kind: Kind[Any]
    show: Callable[[Console, Receipt], None]


KINDS: dict[str, Entry] = {
    entry.kind.name: entry
    for entry in (
        Entry(LAYERS, show_layers),
        Entry(DIFF, show_layers),
        Entry(GREEDY, show_greedy),
        Entry(SMOKE, show_smoke),
        Entry(SELFTEST, show_selftest),
        Entry(METAMORPHIC, show_metamorphic),
        Entry(BENCH, show_bench),
        Entry(TOKENS, show_tokens),
        Entry(WEIGHTS, show_weights),
        Entry(SCORE, show_score),
    )
}
"""Keyed by the receipt's ``kind``."""


def judge(receipt: Receipt, policy: Policy | None = None, now: datetime.datetime | None = None) -> list[GateCheck]:
    """Return every check that the gate makes of a receipt that is valid by the schema.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    return gate.judge(KINDS[receipt["kind"]].kind, receipt, policy, now)


def write_report(receipts: Sequence[str | Path], html: str | Path) -> None:
    """Write one self-contained HTML page about receipts, which are files or folders of them.

    Raises:
        BadInputError: a receipt cannot be read, or there is none.
        UnavailableError: the renderer of figures is not installed (extra ``report``).
        OSError: the page cannot be written.
    """
    pages.write(receipts, html, show_receipt)


def show_receipt(out: Console, receipt: Receipt) -> None:
    """Print a receipt: its headline, contents, verdict and notes."""
    show_headline(out, receipt)
    if receipt["thresholds"] is None:
        show_unavailable(out, receipt)
    else:
        KINDS[receipt["kind"]].show(out, receipt)
    show_notes(out, receipt)
