"""What a variant is: a named way of getting one operation wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.model import taps

EVERY_OP = frozenset({*taps.INPUT_TAPS, *taps.LAYER_TAPS, *taps.HEAD_TAPS})

FAMILIES: dict[int, str] = {
    1: "weight layout",
    2: "weight codes",
    3: "weight blocks",
    4: "weight scale",
    5: "activation quantisation",
    6: "feed-forward",
    7: "norms",
    8: "RoPE",
    9: "attention",
    10: "projections",
    11: "KV cache",
    12: "precision",
    13: "residuals",
    14: "input",
    15: "kernels",
}
"""Families of mistakes; 14 (tokens and templates) is not visible in one operation."""


@dataclass(frozen=True)
class Variant:
    """A mistake as a formula: ``function`` computes, in float64, what an engine with this bug would record.

    ``parameters`` makes a family of candidates, one per value; ``name`` and ``explanation`` then hold ``{}`` for
    it, and ``function`` takes it as second argument. Tables of one family and one set of operations are written
    with ``norm = partial(Variant, family=7, ops=NORMS)``.
    """

    name: str
    """Short, readable, unique for each op."""
    explanation: str
    """One sentence."""
    function: Callable[..., Array]
    """Takes a ``Context``; returns an array shaped as ``Context.target``; raises ``Inapplicable``."""
    parameters: Callable[[Context], Iterable[Any]] | None = None
    family: int = field(kw_only=True)
    ops: frozenset[str] = field(kw_only=True)
    """Names of the operations it applies to."""
    group: str | None = None
    """Common name of candidates of this group that cannot be told apart; may hold ``{}``."""
    deferred: bool = False
    """Costly: tried when nothing else explains the output, or when a cheaper variant of its group does."""
    shown: str | None = None
    """The name in the documentation, if ``name`` is built by a fit."""
    shown_sentence: str | None = None
    """The same of ``explanation``."""

    def candidates(self, context: Context) -> Iterator[Candidate]:
        """Yield the concrete mistakes for one operation."""
        if context.op.name not in self.ops:
            return
        if self.parameters is None:
            yield Candidate(self, self.name, self.explanation, ())
            return
        try:
            for value in self.parameters(context):
                yield Candidate(self, self.name.format(value), self.explanation.format(value), (value,))
        except (Inapplicable, ValueError, IndexError):  # the last two: arrays whose shapes do not match
            return


@dataclass(frozen=True)
class Candidate:
    """One concrete mistake."""

    variant: Variant
    name: str
    explanation: str
    arguments: tuple[Any, ...]

    @property
    def group(self) -> str:
        """Name shared with candidates that differ only in a detail."""
        return (self.variant.group or "").format(*self.arguments) or self.name

    def compute(self, context: Context) -> Array | None:
        """Return the wrong output; None where the mistake cannot be made.

        Other arrays of a malformed trace may have any shape; a variant that would need them cannot be made.
        """
        try:
            output = self.variant.function(context, *self.arguments)
        except (Inapplicable, ValueError, IndexError):  # the last two: shapes that do not match
            return None
        return output if output.shape == context.target.shape else None


def on(*ops: str) -> frozenset[str]:
    """Return the names of the operations a variant applies to."""
    return frozenset(ops)
