"""Faults of models of architecture ``bitnet``: those of all models, and those of its SiLU and its ``.scale``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.zoo.fault import Fault
from tests.zoo.faults import llama

BASE = "bitnet"
OTHERWISE = frozenset({"act-silu"})
"""Faults of other models that are right here."""
_SHARED = ("matrix-scale-skipped", "matrix-scale-twice", "act-relu-squared")
OWN: tuple[Fault, ...] = tuple(replace(fault, base=BASE) for fault in llama.OWN if fault.name in _SHARED)
RIGHT = {name: llama.RIGHT[name] for name in (*_SHARED, "act-on-up")}
"""As ``names.RIGHT``, which counts for the others."""


def on_bitnet(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Yield the faults of other models as a ``bitnet`` model, which has no head of its own, can have them."""
    for fault in faults:
        if "token_ids" not in fault.taps and fault.name not in OTHERWISE and fault.base == "plain":
            yield replace(fault, base=BASE)
