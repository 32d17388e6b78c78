"""Runs of one engine: a digest of every tap they gave, values where they are measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crossval.capture import run
from crossval.compare.rerun import Chunks, Names
from crossval.compare.rows import Skip
from crossval.model import taps
from crossval.passes import PassPlan, PassRecord, Runner, TapArray
from crossval.repeat.metamorphic.cases import Sizes
from crossval.repeat.metamorphic.digests import TapDifference, TapDigests, compare_digests, digest_tap, join, until

LOGITS = "result_output"
UNSTEADY = "a second run gave other numbers: the engine is not deterministic, or recording changes it"


@dataclass(frozen=True)
class Recorded:
    """A run of an engine and what is kept of it; can be run again for values."""

    runner: Runner
    chunks: Chunks
    digests: Mapping[str, TapDigests | str]
    """Of every tap that was given; a text says why a tap cannot be read."""
    records: tuple[PassRecord, ...]
    """Values of a few taps."""
    before: Chunks = ()
    """Another sequence that the engine ran just before, if that matters."""

    @classmethod
    def make(
        cls, runner: Runner, chunks: Chunks, names: Names, values: Collection[str] = (), before: Chunks = ()
    ) -> Recorded:
        """Run the engine on ``before``, if given, then from an empty cache on ``chunks``; per group of taps."""
        digests: dict[str, TapDigests | str] = {}
        kept: list[dict[str, TapArray]] = [{} for _ in chunks]
        plans: list[PassPlan] = []
        for group in names.groups(names.all, chunks):
            select = list(dict.fromkeys([*group, LOGITS]))  # the logits in every run
            passes: list[Mapping[str, TapDigests | str]] = []
            plans = []
            _start(runner, before)
            for chunk, held in zip(chunks, kept, strict=True):
                record = runner.eval(chunk, select)
                passes.append(_digest_pass(record))
                plans.append(record.plan)
                held |= {name: record.taps[name] for name in values if name in record.taps}
            for name in select:
                found = _whole(name, passes)
                if name in digests and not _same(digests[name], found):
                    found = UNSTEADY
                if found is not None:
                    digests[name] = found
        records = tuple(PassRecord(plan, held) for plan, held in zip(plans, kept, strict=True))
        return cls(runner, chunks, digests, records, before)

    @property
    def sizes(self) -> Sizes:
        """Tokens of each pass."""
        return tuple(map(len, self.chunks))

    def values(self, select: Collection[str]) -> tuple[PassRecord, ...]:
        """Run the same once more for the values of some taps."""
        _start(self.runner, self.before)
        return tuple(self.runner.eval(chunk, select) for chunk in self.chunks)

    def beginning(self, n_passes: int) -> Recorded:
        """Return the first passes alone."""
        end = sum(self.sizes[:n_passes])
        digests = {
            name: found if isinstance(found, str) else until(found, end) for name, found in self.digests.items()
        }
        return Recorded(self.runner, self.chunks[:n_passes], digests, self.records[:n_passes])


def _start(runner: Runner, before: Chunks) -> None:
    if before:
        run(runner, before, ())
    runner.reset()


def _digest_pass(record: PassRecord) -> dict[str, TapDigests | str]:
    found: dict[str, TapDigests | str] = {}
    for name, tap in record.taps.items():
        try:
            found[name] = digest_tap(name, tap, record.plan)
        except ValueError as error:
            found[name] = str(error)
    return found


def _whole(name: str, passes: Sequence[Mapping[str, TapDigests | str]]) -> TapDigests | str | None:
    """Return the digests of a whole run, or why there are none; None when no pass gave the tap."""
    found = [one[name] for one in passes if name in one]
    wrong = next((one for one in found if isinstance(one, str)), None)
    if wrong is not None or not found:
        return wrong
    if len(found) < len(passes):
        return f"{name}: given in {len(found)} of {len(passes)} passes only"
    try:
        return join(name, [one for one in found if isinstance(one, TapDigests)])
    except ValueError as error:
        return str(error)


def _same(one: TapDigests | str, other: TapDigests | str | None) -> bool:
    if isinstance(one, TapDigests) and isinstance(other, TapDigests):
        return one.shape == other.shape and all(
            np.array_equal(getattr(one, part), getattr(other, part)) for part in ("positions", "digests")
        )
    return one == other


def compare_taps(names: Sequence[str], one: Recorded, other: Recorded) -> Iterator[TapDifference | Skip]:
    """Compare taps of two runs by digest; those of tensors that the model does not have are left out."""
    for name in names:
        first, second = one.digests.get(name), other.digests.get(name)
        if first is None and second is None and taps.is_optional(name):
            continue
        if isinstance(first, TapDigests) and isinstance(second, TapDigests):
            yield compare_digests(name, first, second)
            continue
        which, why = ("second", second) if isinstance(first, TapDigests) else ("first", first)
        yield Skip(0, name, f"{which} run: {why}" if why else f"the engine did not give it in the {which} run")
