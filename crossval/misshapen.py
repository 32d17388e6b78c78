"""An array of the wrong shape: what it looks like, and how to bring it into the right one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from crossval import taps

_SCORES = ("kq", "kq_soft_max")


def hint(
    name: str, shape: Sequence[int], expected: Sequence[int], keys_of: Mapping[int, int] | None = None
) -> str:
    """Return what to do about a tap's shape, empty when nothing can be told.

    ``keys_of``: how many keys the other passes see, by their index.
    """
    if len(shape) == len(expected) == 3 and taps.parse(name).tap in _SCORES and shape[:2] == expected[:2]:
        return _keys(shape[2], expected[2], keys_of or {})
    if sorted(shape) == sorted(expected):
        return f"the axes are in another order: write ({', '.join(_axes(name))}), the last running fastest"
    if math.prod(shape) == math.prod(expected):
        return f"it holds as many values: give it the shape [{', '.join(map(str, expected))}]"
    return ""


def _keys(found: int, expected: int, keys_of: Mapping[int, int]) -> str:
    """Explain attention scores over another number of keys than the tokens so far."""
    alike = [index for index, n_keys in keys_of.items() if n_keys == found]
    other = f"; pass {alike[0]} sees {found} keys: are the passes in another order?" if alike else ""
    if found < expected:
        return f"it has {found} keys, the tokens so far are {expected}: cells of the KV cache are missing{other}"
    cells = "one cell" if found == expected + 1 else f"{found - expected} cells"
    return (
        f"it has {found} keys, the tokens so far are {expected}: the KV cache is padded or holds {cells} more; "
        f"cut the last axis to the cells of positions 0 to {expected - 1} (array[:, :, :{expected}]){other}"
    )


def _axes(name: str) -> tuple[str, ...]:
    tap = taps.parse(name).tap
    if tap in _SCORES:
        return "head", "token", "key"
    return ("token", "head", "feature") if tap in ("q", "q_rope", "k", "k_rope", "v") else ("token", "feature")
