"""Receipts as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossval.registry import show_receipt
from crossval.report import pages


def write_report(receipts: Sequence[str | Path], html: str | Path) -> None:
    """Write one self-contained HTML page about receipts, which are files or folders of them.

    Raises:
        BadInputError: a receipt cannot be read, or there is none.
        UnavailableError: the renderer of figures is not installed (extra ``report``).
        OSError: the page cannot be written.
    """
    pages.write(receipts, html, show_receipt)
