"""What a fault is, and where it can happen: plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from crossval.passes import PassKind
from crossval.selftest.damage import DamagedModel
from tests.zoo.recording import Recording

FAMILIES = (
    "weights: layout",
    "weights: code table",
    "weights: block size",
    "weights: scale",
    "activation quantisation",
    "FFN",
    "norms",
    "RoPE",
    "attention",
    "projections",
    "KV cache",
    "precision",
    "residuals",
    "input",
    "kernels",
)
"""Families 1 to 15."""

N_LAYERS = 5
FIRST, MIDDLE, LAST = 0, 2, N_LAYERS - 1
BOTH: tuple[PassKind, ...] = ("prefill", "decode")
PREFILL: tuple[PassKind, ...] = ("prefill",)
DECODE: tuple[PassKind, ...] = ("decode",)

How = Literal["c", "weights", "trace"]


@dataclass(frozen=True)
class Case:
    """A fault at one place, and what the harness has to report."""

    fault: Fault
    tap: str
    """Full name of the first tap that is wrong."""
    pass_kind: PassKind
    """Kind of the first pass that is wrong."""
    layer: int | None = None
    op: str | None = None
    """C faults: the operation whose code goes wrong, where the fault can sit in several."""
    only: PassKind | None = None
    """C faults: happens in passes of this kind only; None: in every pass. Trace faults: of this pass."""

    @property
    def id(self) -> str:
        """Unique, readable name."""
        return "-".join([self.fault.name, self.tap, *([f"{self.only} only"] if self.only else [])])

    @property
    def selection(self) -> str:
        """The case in the words of ``BN_FAULT``."""
        place = {"layer": self.layer, "op": self.op, "pass": self.only}
        return ":".join([self.fault.name, *(f"{k}={v}" for k, v in place.items() if v is not None)])


@dataclass(frozen=True)
class Fault:
    """One fault."""

    name: str
    family: int
    """1 to 15, as in ``FAMILIES``."""
    what: str
    """In words, for the documentation."""
    taps: tuple[str, ...]
    """Taps, without layer, that can be the first wrong one; the first of them is tried in more places."""
    passes: tuple[PassKind, ...] = BOTH
    """Kinds of pass in which it shows."""
    layers: tuple[int, ...] = (FIRST, MIDDLE, LAST)
    """Layers to try; empty for what is not in a layer."""
    base: str = "plain"
    """Model (``models.BASES``) that the healthy and the faulty engine run."""

    @property
    def how(self) -> How:
        """Where it is injected."""
        raise NotImplementedError

    def cases(self) -> Iterator[Case]:
        """Yield the places to try: every layer at the first tap, the middle one at the others; C faults that show
        in both kinds of pass also in one kind only."""
        always = self.passes[0] if len(self.passes) == 1 else None
        for tap in self.taps:
            layers: tuple[int | None, ...] = self.layers or (None,)
            middle = layers[len(layers) // 2]
            first = tap == self.taps[0]
            for layer in layers if first else (middle,):
                yield self._case(tap, layer, always)
            if first and always is None:
                for only in self.passes:
                    yield from self._in_one_kind(tap, middle, only)

    def _in_one_kind(self, tap: str, layer: int | None, only: PassKind) -> Iterator[Case]:
        return iter(())

    def _case(self, tap: str, layer: int | None, only: PassKind | None) -> Case:
        full = tap if layer is None else f"blk.{layer}.{tap}"
        return Case(self, full, only or "prefill", layer, self._op(tap), only)

    def _op(self, tap: str) -> str | None:
        return None


@dataclass(frozen=True)
class EngineFault(Fault):
    """C code put into a copy of the engine's sources."""

    edits: Mapping[str, str] = field(default_factory=dict)
    """Site (``sites.SITES``) -> wrong code."""
    ops: Mapping[str, str] = field(default_factory=dict)
    """Tap -> the operation whose code goes wrong; needed where the code serves several."""

    @property
    def how(self) -> How:
        return "c"

    def _op(self, tap: str) -> str | None:
        return self.ops.get(tap)

    def _in_one_kind(self, tap: str, layer: int | None, only: PassKind) -> Iterator[Case]:
        yield self._case(tap, layer, only)


@dataclass(frozen=True)
class WeightFault(Fault):
    """A modified copy of the model file; the specification reads the original."""

    damage: Callable[[DamagedModel, str], None] = lambda model, tap: None
    """Changes a copy of the file, given the full name of the tap that must become wrong."""
    source: str = ""
    """Base that is copied, when it is not ``base``."""

    @property
    def how(self) -> How:
        return "weights"


@dataclass(frozen=True)
class TraceFault(Fault):
    """A healthy engine's trace in which one array was changed. What follows it was computed from the correct one,
    so the operation that reads it no longer fits either: only the *first* finding is the fault."""

    change: Callable[[Recording, int, str], None] = lambda recording, index, tap: None
    """Changes the recording in place, given the pass and the tap."""

    @property
    def how(self) -> How:
        return "trace"

    def _in_one_kind(self, tap: str, layer: int | None, only: PassKind) -> Iterator[Case]:
        if only != "prefill":  # without a restriction the prompt's pass is changed
            yield self._case(tap, layer, only)
