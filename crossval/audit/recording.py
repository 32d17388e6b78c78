"""Recording errors: is the engine wrong, or what was recorded of it?

An operation that computes wrong values passes them on, and what reads them agrees with them. A tensor that was
recorded incorrectly (its buffer overwritten by a later operation, a query copied after RoPE rotated it in place)
was read by nothing: the operation that makes it and those that read it are outside their bounds, and all of them
pass once the tensor is treated as if it had not been recorded. Only then is it a recording error. The audit goes
on as if the tensor were missing, so nothing is proven about it, and the engine cannot get a clean audit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from crossval.audit import contents, feeding
from crossval.audit.altered import Altered
from crossval.audit.audit import audit
from crossval.audit.checks import (
    AuditResult,
    CheckStatus,
    Misrecorded,
    OpCheck,
    decide,
    first_guilty,
    in_order,
    unless_misrecorded,
)
from crossval.audit.contents import Contents
from crossval.capture import Place, Source
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.kinds import ACTIVATIONS, Softmax
from crossval.model.op import Op
from crossval.model.weights import SpecWeights
from crossval.terms import Progress

MOST_GROUPS = 8
"""Operations (each in all layers) whose outputs are suspected; with more of them it is no recording error."""
SWALLOWS = (Softmax, *map(type, ACTIVATIONS.values()))
"""Kinds that may turn NaN or infinity into ordinary numbers: that they pass proves nothing about their inputs."""


@dataclass(frozen=True)
class Settled:
    """An audit after the recording was questioned, and the source of what can be relied on."""

    result: AuditResult
    source: Source


@dataclass(frozen=True)
class Graph:
    """Which operations read which tensors, over all passes of one audit."""

    readers: Mapping[str, tuple[Op, ...]]
    by_output: Mapping[str, Op]
    n_passes: int

    @classmethod
    def of(cls, ops: Sequence[Op], n_passes: int) -> Graph:
        """Build it from the table of operations."""
        readers: dict[str, list[Op]] = {}
        for op in ops:
            for name in op.inputs:
                readers.setdefault(name, []).append(op)
        return cls({name: tuple(read) for name, read in readers.items()}, {op.output: op for op in ops}, n_passes)

    def direct(self, place: Place) -> list[Place]:
        """Return the outputs of the operations that read a tensor; a cache is read in all later passes too."""
        index, tap = place
        found = [(index, op.output) for op in self.readers.get(tap, ())]
        state = self.by_output[tap].appends_to
        if state is not None:
            later = range(index, self.n_passes)
            found += [(at, op.output) for at in later for op in self.readers.get(state, ())]
        return found

    def frontier(self, place: Place, recorded: Collection[Place]) -> set[Place]:
        """Return the recorded tensors that a tensor reaches without passing another recorded one."""
        found: set[Place] = set()
        seen: set[Place] = set()
        pending = self.direct(place)
        while pending:
            at = pending.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in recorded:
                found.add(at)
            else:
                pending += self.direct(at)
        return found


def settle(
    source: Source, result: AuditResult, weights: SpecWeights, *, progress: Progress | None = None
) -> Settled:
    """Find out whether the recording is wrong, not the engine; return the audit without what is wrong in it.

    ``result.misrecorded`` then says which tensors they are. The source is the one given when nothing was found.

    Raises:
        UnavailableError, EngineCrashError: from the runner.
    """
    told: list[Misrecorded] = []
    for refeed in (feeding.other_order, feeding.other_tokens):
        other = refeed(source, weights) if _reads_positions(result) else None
        if other is not None:
            (tried,) = audit([other.source], weights, progress=progress)
            if not _reads_positions(tried) and len(_wrong(tried)) < len(_wrong(result)):
                source, result = other.source, tried
                told.append(other.misrecorded)
    search = _Search(
        checks=_by_place(result.checks),
        graph=Graph.of(op_table(weights.config), len(source.plans)),
        again=lambda places: audit([source], weights, progress=progress, distrusted=places)[0],
        contents=lambda place: contents.find(source, place, weights),
    )
    settled = search.run() if result.verdict == "guilty" else None
    if settled is None:
        return Settled(_without(result, (), told), source)
    found, final = settled
    told += [_describe(group, search.contents(min(group, key=in_order))) for group in _groups(found)]
    return Settled(_without(final, found, told), Altered(source, source.plans, hidden=frozenset(found)))


def _wrong(result: AuditResult) -> set[Place]:
    return {check.place for check in result.checks if check.wrong}


def _reads_positions(result: AuditResult) -> bool:
    """Return whether an operation on token ids or positions is wrong, or a segment that begins with one."""
    first = {feeding.EMBEDDING, *feeding.ROTATIONS, f"blk.0.{taps.LAYER_TAPS[-1]}"}
    return any(check.wrong and check.tap in first for check in result.checks)


def _without(final: AuditResult, found: Collection[Place], told: Sequence[Misrecorded]) -> AuditResult:
    """Take what was recorded incorrectly out of an audit that did not rely on it."""
    checks = tuple(check for check in final.checks if check.place not in found)
    verdict = unless_misrecorded(decide(checks, final.n_ops, final.n_covered), len(told))
    return replace(
        final, checks=checks, first_guilty=first_guilty(checks), verdict=verdict, misrecorded=tuple(told)
    )


# --- searching ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """One audit that found something wrong, and how to do it again without relying on some of the tensors."""

    checks: Mapping[Place, OpCheck]
    graph: Graph
    again: Callable[[Collection[Place]], AuditResult]
    contents: Callable[[Place], Contents]
    """What a tensor really contains."""

    def run(self) -> tuple[set[Place], AuditResult] | None:
        """Return the incorrectly recorded tensors and the audit without relying on them; None: there are none."""
        wrong = {place for place, check in self.checks.items() if check.wrong}
        groups = _groups(self._suspects(wrong))
        if not groups or len(groups) > MOST_GROUPS:
            return None
        suspects = set().union(*groups)
        last = self.again(suspects)
        found = self._confirmed(suspects, suspects, last)
        for group in groups if len(groups) > 1 else ():  # an engine's bug among them spoils what comes after it
            rest = group - found
            if rest:
                found |= self._confirmed(rest, found | rest, self.again(found | rest))
        if not found:
            return None
        final = last if found == suspects else self.again(found)
        left = {place for place, check in _by_place(final.checks).items() if check.wrong}
        confirmed = self._confirmed(found, found, final) == found
        return (found, final) if confirmed and left <= wrong else None

    def _suspects(self, wrong: Collection[Place]) -> set[Place]:
        """Return wrong tensors whose readers are wrong, too; of values not finite, those whose readers pass."""
        found = set()
        for place in wrong:
            check, states = self.checks[place], self._states(place, (), self.checks)
            swallowed = any(isinstance(op.kind, SWALLOWS) for op in self.graph.readers.get(place[1], ()))
            unread = check.n_nonfinite > 0 and set(states) == {"ok"} and not swallowed
            if unread or (check.status == "guilty" and "guilty" in states):
                found.add(place)
        return found

    def _states(
        self, place: Place, distrusted: Collection[Place], checks: Mapping[Place, OpCheck]
    ) -> list[CheckStatus]:
        """Return how the first recorded tensors after one were judged."""
        recorded = {at for at, check in self.checks.items() if at not in distrusted and check.status != "invalid"}
        return [checks[at].status for at in self.graph.frontier(place, recorded)]

    def _confirmed(
        self, members: Collection[Place], distrusted: Collection[Place], tried: AuditResult
    ) -> set[Place]:
        """Return those of the distrusted tensors that are wrong themselves and after which everything passes.

        Within a tolerance is not enough, unless the tensor holds another one's values to the last bit.
        """
        checks = _by_place(tried.checks)
        found = set()
        for place in members:
            states = set(self._states(place, distrusted, checks))
            agree = "within" in states and states <= {"ok", "within"} and self.contents(place).exact
            if (states == {"ok"} or agree) and checks[place].wrong:
                found.add(place)
        return found


def _by_place(checks: Iterable[OpCheck]) -> dict[Place, OpCheck]:
    return {check.place: check for check in checks}


# --- saying it ------------------------------------------------------------------------------------------------


def _groups(places: Iterable[Place]) -> list[set[Place]]:
    """Put the same operation of all layers and passes together, in execution order."""

    def name(place: Place) -> str:
        return taps.parse(place[1]).tap

    together = [set(group) for _, group in groupby(sorted(places, key=name), key=name)]
    return sorted(together, key=lambda group: min(map(in_order, group)))


def _describe(members: Collection[Place], found: Contents) -> Misrecorded:
    names = sorted({tap for _, tap in members}, key=taps.execution_index)
    return Misrecorded(
        kind="tap",
        taps=tuple(names),
        passes=tuple(sorted({index for index, _ in members})),
        explanation=found.what,
        remedy=found.remedy,
    )
