"""The states that figures show: one colour and one sign each, so that no reader depends on colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATES: dict[str, tuple[str, str]] = {
    "exact": ("var(--exact)", ""),
    "within its bound": ("var(--fine)", ""),
    "within, not settled": ("var(--open)", "~"),
    "beyond its bound": ("var(--wrong)", "✗"),
    "not finite": ("var(--invalid)", "!"),
    "not checked": ("var(--none)", "?"),
}
"""Name -> colour and sign. A tensor is compared (exact: all bits equal) or audited (exact: as computed again)."""

COMPARED = {
    "equal": "exact",
    "within": "within its bound",
    "diverged": "beyond its bound",
    "invalid": "not finite",
}
"""Status of a compared row -> state."""
AUDITED = {
    "ok": "within its bound",
    "within": "within, not settled",
    "guilty": "beyond its bound",
    "invalid": "not finite",
    "unchecked": "not checked",
}
"""Status of an audited operation -> state."""


def colour(found: Sequence[str]) -> dict[str, Any]:
    """Return the colour channel of a figure that shows the given states; the page explains them once."""
    shown = [name for name in STATES if name in found]
    return {
        "field": "state",
        "type": "nominal",
        "scale": {"domain": shown, "range": [STATES[name][0] for name in shown]},
        "legend": None,
    }
