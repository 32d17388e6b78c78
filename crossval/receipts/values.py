"""JSON values of receipts: compared, and shown in messages."""

from __future__ import annotations

from typing import Any


def same(expected: Any, found: Any) -> bool:
    """Return whether two values of a receipt are equal, and of the same type."""
    if isinstance(expected, float) and isinstance(found, int) and not isinstance(found, bool):
        return expected == found  # JSON does not tell 1 from 1.0
    return type(expected) is type(found) and bool(expected == found)


def show(value: Any) -> str:
    """Return a value for a message, cut when it is long."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
