"""The kinds of receipts, one row each. Imported by the command line and the Python API only.

To add a kind: a package that describes its receipts (``receipts.kind.Kind``) and shows them, the definition of its
results in ``schemas/receipt.v1.schema.json``, and a row here.
"""

from __future__ import annotations

import datetime
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from crossval.receipts import gate
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Kind
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.show import show_headline, show_notes, show_unavailable

Show = Callable[[Console, Receipt], None]


@dataclass(frozen=True)
class Entry:
    """A kind of receipt, imported when it is asked for: to judge one kind must not load all features."""

    kind_at: str
    """Where its ``Kind`` is: ``module:name``."""
    show_at: str
    """Where the function is that prints its contents, without headline and notes."""

    @property
    def kind(self) -> Kind[Any]:
        """How receipts of this kind are made and judged."""
        found: Kind[Any] = pkgutil.resolve_name(self.kind_at)
        return found

    @property
    def show(self) -> Show:
        """How they are printed."""
        found: Show = pkgutil.resolve_name(self.show_at)
        return found


KINDS: dict[str, Entry] = {
    "layers": Entry("crossval.examine.layers_receipt:LAYERS", "crossval.examine.layers_show:show_layers"),
    "diff": Entry("crossval.examine.layers_receipt:DIFF", "crossval.examine.layers_show:show_layers"),
    "greedy": Entry("crossval.examine.greedy_receipt:GREEDY", "crossval.examine.greedy_show:show_greedy"),
    "smoke": Entry("crossval.smoke.receipt:SMOKE", "crossval.smoke.show:show_smoke"),
    "selftest": Entry("crossval.selftest.receipt:SELFTEST", "crossval.selftest.show:show_selftest"),
    "metamorphic": Entry(
        "crossval.repeat.metamorphic.receipt:METAMORPHIC", "crossval.repeat.metamorphic.show:show_metamorphic"
    ),
    "bench": Entry("crossval.bench.receipt:BENCH", "crossval.bench.show:show_bench"),
    "tokens": Entry("crossval.tokens.receipt:TOKENS", "crossval.tokens.show:show_tokens"),
    "weights": Entry("crossval.weights.receipt:WEIGHTS", "crossval.weights.show:show_weights"),
    "score": Entry("crossval.score.receipt:SCORE", "crossval.score.show:show_score"),
}
"""Keyed by the receipt's ``kind``."""


def judge(receipt: Receipt, policy: Policy | None = None, now: datetime.datetime | None = None) -> list[GateCheck]:
    """Return every check that the gate makes of a receipt that is valid by the schema.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    return gate.judge(KINDS[receipt["kind"]].kind, receipt, policy, now)


def show_receipt(out: Console, receipt: Receipt) -> None:
    """Print a receipt: its headline, contents, verdict and notes."""
    show_headline(out, receipt)
    if receipt["thresholds"] is None:
        show_unavailable(out, receipt)
    else:
        KINDS[receipt["kind"]].show(out, receipt)
    show_notes(out, receipt)
