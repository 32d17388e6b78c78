"""Faults of models of architecture ``bitnet``: those of all models, and those of its SiLU and its ``.scale``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.zoo.fault import Fault
from tests.zoo.faults import llama

BASE, SCALED = "bitnet", "bitnet-scales"
OTHERWISE = frozenset({"act-silu", "file-head-not-tied"})
"""Faults of other models that are right here, or need a head of their own, which these models have not."""
_SHARED = {"matrix-scale-skipped": SCALED, "matrix-scale-twice": SCALED, "act-relu-squared": BASE}
"""Fault that llama models can have, too -> base."""
OWN: tuple[Fault, ...] = tuple(
    replace(fault, base=_SHARED[fault.name]) for fault in llama.OWN if fault.name in _SHARED
)
RIGHT = {name: llama.RIGHT[name] for name in (*_SHARED, "act-on-up")}
"""As ``names.RIGHT``, which counts for the others."""


def on_bitnet(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Yield the faults of other models as a ``bitnet`` model, which has no head of its own, can have them."""
    for fault in faults:
        if "token_ids" not in fault.taps and fault.name not in OTHERWISE and fault.base == "plain":
            yield replace(fault, base=BASE)
