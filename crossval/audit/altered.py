"""Passes read differently than they were recorded: without some arrays, in another order, as of other tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from crossval.capture import Place, Source
from crossval.passes import PassPlan, PassRecord, Runner


@dataclass(frozen=True)
class Altered:
    """The passes of another source, read differently."""

    source: Source
    plans: Sequence[PassPlan]
    """What the passes are taken to be fed."""
    order: tuple[int, ...] | None = None
    """For each pass, the one whose arrays it gets; None: its own."""
    hidden: frozenset[Place] = frozenset()
    """Arrays treated as not recorded."""

    @property
    def runner(self) -> Runner:
        """The engine itself."""
        return self.source.runner

    def records(
        self, names: Collection[str], n_passes: int | None = None, *, ahead: bool = False
    ) -> tuple[PassRecord, ...]:
        """Return the named taps of the first passes (None: of all), as they are to be read."""
        given = self.source.records(names, None if self.order else n_passes, ahead=ahead)
        if self.order is not None:
            given = tuple(given[at] for at in self.order)
        return tuple(
            PassRecord(plan, {name: tap for name, tap in record.taps.items() if (index, name) not in self.hidden})
            for index, (plan, record) in enumerate(zip(self.plans[:n_passes], given, strict=False))
        )
