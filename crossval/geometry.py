"""How passes and taps relate to tokens: what kind a pass is, which axis counts tokens, which are covered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from crossval import taps
from crossval.runners.base import PassKind


def pass_kind(n_tokens: int, start: int) -> PassKind:
    """Return what one call of an engine is: one token behind others is a decode pass, all else is prefill."""
    return "decode" if n_tokens == 1 and start > 0 else "prefill"


def token_axis(name: str) -> int:
    """Return the axis of a tap that counts tokens."""
    return 1 if taps.parse(name).tap in ("kq", "kq_soft_max") else 0


def check_rows(name: str, rows: tuple[int, ...] | None, n_tokens: int) -> None:
    """Check that ``rows`` lists tokens of the pass, ascending; None stands for all of them.

    Raises:
        ValueError: empty, repeated, unsorted, or outside the pass.
    """
    if rows is None:
        return
    if not rows or any(b <= a for a, b in pairwise(rows)) or rows[0] < 0 or rows[-1] >= n_tokens:
        raise ValueError(f"{name}: rows must be ascending token indices below {n_tokens}, got {short_list(rows)}")


def short_list(values: Sequence[int]) -> str:
    """Return a list of numbers for a message, cut after eight."""
    return f"[{', '.join(map(str, values[:8]))}{', …' if len(values) > 8 else ''}]"
