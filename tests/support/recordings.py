"""Typical choices of recorded taps: from every tap to the logits alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table

NORMS = frozenset({"attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"})
SCORES = frozenset({"kq", "kq_soft_max"})
ENDS = frozenset({*taps.INPUT_TAPS, *taps.HEAD_TAPS})


@dataclass(frozen=True)
class Kept:
    """One choice of taps."""

    name: str
    why: str
    """Who records like this."""
    keeps: Callable[[str], bool]
    """Whether a tap, by its full name, is recorded."""


def _lacks(missing: Collection[str]) -> Callable[[str], bool]:
    return lambda name: taps.parse(name).tap not in missing


def _third(name: str) -> bool:
    layer = taps.parse(name).layer
    return name in ENDS or (name.endswith(".l_out") and layer is not None and layer % 3 == 2)


RECORDINGS: tuple[Kept, ...] = (
    Kept("all taps", "the whole vocabulary", lambda name: True),
    Kept("no norms", "the norm and the quantiser behind it are one kernel", _lacks(NORMS)),
    Kept("no scores", "flash attention", _lacks(SCORES)),
    Kept("every `l_out`", "the smallest useful trace", lambda name: name in ENDS or name.endswith(".l_out")),
    Kept("every third `l_out`", "a large model, little disk", _third),
    Kept("logits only", "an engine that gives nothing else", lambda name: name == "result_output"),
)
BY_NAME = {one.name: one for one in RECORDINGS}


def answers(config: SpecConfig, tap: str, keeps: Callable[[str], bool]) -> frozenset[str]:
    """Return the recorded taps at which a bug in one operation can show first: its own, or those that read it
    with nothing recorded in between."""
    readers: dict[str, list[str]] = {}
    for op in op_table(config):
        for name in op.inputs:
            source = name.replace("k_cache", "k_rope").replace("v_cache", "v")
            readers.setdefault(source, []).append(op.output)
    found: set[str] = set()
    open_ends = [tap]
    while open_ends:
        name = open_ends.pop()
        if keeps(name):
            found.add(name)
        else:
            open_ends += readers.get(name, [])
    return frozenset(found)
