"""Find how each engine runs fastest, then run all engines in turn and take every measure.

Machines are noisy: only measurements made side by side can be compared. All engines run in every round, each in
the settings chosen for it, and the one that starts changes from round to round.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bitnet_py.bench import BandwidthProbe, weight_reads
from bitnet_py.model import KernelCount
from crossval.bench.engine import BitnetPyProcess
from crossval.bench.figures import BenchFindings, Pair
from crossval.bench.measures import FIRST_TOKEN, MEASURES, PROCESS, ROUND, TRIED, Measure, Running, Sample, Work
from crossval.bench.search import N_TRIALS, Search, Setting, Tried, settings_to_try
from crossval.bench.stage import CannotPinError, Entrant, OpenEngine, Stage
from crossval.bench.tally import Tally
from crossval.bench.threads import can_place, usable_cores
from crossval.compare.rows import choose_policy
from crossval.passes import EngineIdentity, Numerics
from crossval.terms import SIDES, Progress, Side

Samples = Mapping[str, Sample]
"""By name of the measure."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Task:
    """What to measure. ``n_threads``: of every engine; None: as many as make each fastest.

    ``candidate_follows``, ``references_follow``: whether an engine computes as the one it is compared
    with states that it does; one entry per reference. ``kernel``: the kernel family requested of
    the candidate. ``min_ratios``: by name of the measure; None: any.
    """

    work: Work
    n_layers: int
    candidate_follows: bool = True
    references_follow: tuple[bool, ...] = (False,)
    n_threads: int | None = None
    kernel: str | None = None
    min_ratios: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class BenchRun:
    """The findings, the engines of each pair, and the candidate's counters at the end of the rounds."""

    findings: BenchFindings
    identities: tuple[Mapping[Side, EngineIdentity], ...]
    counters: Sequence[KernelCount]


def run_bench(open_engine: OpenEngine, task: Task, progress: Progress) -> BenchRun:
    """Measure all engines.

    ``open_engine`` starts an engine's process; ``progress`` is called with the current activity, the
    steps done, and their total.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: from the engines.
    """
    work = task.work
    total = N_TRIALS + 1 + work.n_rounds + work.n_processes
    with Stage(open_engine, work) as stage:
        progress("starting the engines", 0, total)
        field = _Field(stage, task)
        pairs = field.enter()
        for index in range(N_TRIALS):
            progress("finding threads", index, total)
            field.try_all(index)
        field.choose()
        identities = tuple({side: field.identity(pair[side]) for side in SIDES} for pair in pairs)
        policies = [choose_policy(one["candidate"], one["reference"]) for one in identities]
        tallies = [{m.name: Tally(m, policy, task.n_layers) for m in MEASURES} for policy in policies]

        def add(samples: Mapping[Entrant, Samples], measures: Sequence[Measure], *, counted: bool) -> None:
            for pair, tally in zip(pairs, tallies, strict=True):
                for measure in measures:
                    found = {side: samples[pair[side]][measure.name] for side in SIDES}
                    tally[measure.name].add(found, counted=counted)

        probe, read_s = BandwidthProbe(work.n_threads), []
        for index in range(work.n_rounds + 1):
            progress("rounds", N_TRIALS + index, total)
            add(field.round(index), ROUND, counted=index > 0)
            if index:
                stage.rest()
                read_s.append(probe.seconds())
        counters = field.counters()
        stage.end_all()
        for index in range(work.n_processes):
            progress("fresh processes", N_TRIALS + 1 + work.n_rounds + index, total)
            add(field.fresh(index), PROCESS, counted=True)
        progress("done", total, total)
        found = tuple(
            Pair(
                {name: one.taken() for name, one in tally.items()},
                policy,
                {side: field.search(pair[side]) for side in SIDES},
            )
            for pair, policy, tally in zip(pairs, policies, tallies, strict=True)
        )
    findings = BenchFindings(work, task.kernel, found, probe.n_bytes, tuple(read_s), dict(task.min_ratios or {}))
    return BenchRun(findings, identities, counters)


class _Field:
    """The engines of a benchmark, and the settings tried and chosen for each."""

    def __init__(self, stage: Stage, task: Task) -> None:
        self._stage, self._task = stage, task
        self._raw: dict[tuple[Entrant, Setting], dict[str, list[float]]] = {}
        self._not_pinned: dict[Entrant, str] = {}
        self._identities: dict[Entrant, list[EngineIdentity]] = defaultdict(list)
        self._chosen: dict[Entrant, dict[str, Setting]] = {}

    def enter(self) -> list[dict[Side, Entrant]]:
        """Start every engine in every setting; return who is compared with whom, one pair per reference.

        An engine that follows another starts after it, once for each arithmetic that it follows.
        """
        leader = None if self._task.candidate_follows else self._start_all(Entrant("candidate", 0))
        candidates: dict[Numerics | None, Entrant] = {}
        pairs: list[dict[Side, Entrant]] = []
        for index, follows in enumerate(self._task.references_follow):
            led = self._numerics(leader) if leader is not None and follows else None
            reference = self._start_all(Entrant("reference", index, led))
            numerics = None if follows else self._numerics(reference)
            candidate = leader or candidates.setdefault(numerics, Entrant("candidate", len(candidates), numerics))
            pairs.append({"candidate": candidate, "reference": reference})
        for candidate in candidates.values():
            self._start_all(candidate)
        return pairs

    def _numerics(self, entrant: Entrant) -> Numerics:
        return self._identities[entrant][0].numerics

    def _start_all(self, entrant: Entrant) -> Entrant:
        for setting in settings_to_try(usable_cores(), self._task.n_threads, can_place=can_place()):
            running = self._stage.start(entrant, setting)
            self._identities[entrant].append(running.engine.identity)
            raw: dict[str, list[float]] = {measure.name: [] for measure in TRIED}
            if setting.cores:
                try:
                    self._stage.pin(entrant, setting)
                except CannotPinError as error:
                    self._not_pinned[entrant] = str(error)
                    self._stage.end(entrant, setting)
                    continue
            else:
                _keep(raw[FIRST_TOKEN.name], FIRST_TOKEN.run(running, self._task.work))
            self._raw[entrant, setting] = raw
            self._sequence(entrant, setting, ROUND)
        return entrant

    def try_all(self, index: int) -> None:
        """Take the measures of a round once in every setting, which starts another one each time."""
        for entrant, setting in _turned(list(self._raw), index):
            for name, sample in self._sequence(entrant, setting, ROUND).items():
                _keep(self._raw[entrant, setting][name], sample)

    def choose(self) -> None:
        """Choose each engine's setting for each measure, and end the processes that no measure needs."""
        for entrant in self._entrants():
            search = self.search(entrant)
            usable = [one.setting for one in search.tried if self._task.n_threads in (None, one.setting.n_threads)]
            self._chosen[entrant] = {measure.name: search.chosen(measure.name) or usable[0] for measure in TRIED}
        for entrant, setting in self._raw:
            if setting not in self._needed(entrant):
                self._stage.end(entrant, setting)

    def search(self, entrant: Entrant) -> Search:
        """Return what was tried."""
        tried = tuple(
            Tried(setting, {name: tuple(values) for name, values in raw.items()})
            for (one, setting), raw in self._raw.items()
            if one == entrant
        )
        idle = self._stage.idle.get(entrant, "unseen")
        return Search(tried, self._task.n_threads, idle, self._not_pinned.get(entrant))

    def identity(self, entrant: Entrant) -> EngineIdentity:
        """Return the engine's identity; of the settings those that all its processes share."""
        first, *others = self._identities[entrant]
        shared = {
            name: value
            for name, value in first.settings.items()
            if all(one.settings.get(name) == value for one in others)
        }
        return replace(first, settings=shared)

    def round(self, index: int) -> dict[Entrant, Samples]:
        """Take all measures of one engine after the other, each in its setting."""
        found: dict[Entrant, Samples] = {}
        for entrant in _turned(self._entrants(), index):
            samples: dict[str, Sample] = {}
            for setting, names in self._needed(entrant).items():
                last = max(i for i, measure in enumerate(ROUND) if measure.name in names)
                taken = self._sequence(entrant, setting, ROUND[: last + 1])
                samples |= {name: taken[name] for name in names}
            found[entrant] = samples
        return found

    def fresh(self, index: int) -> dict[Entrant, Samples]:
        """Take the measures of a fresh process of one engine after the other."""
        found: dict[Entrant, Samples] = {}
        for entrant in _turned(self._entrants(), index):
            setting = self._chosen[entrant][FIRST_TOKEN.name]
            running = self._stage.start(entrant, setting)
            found[entrant] = {measure.name: measure.run(running, self._task.work) for measure in PROCESS}
            self._stage.end(entrant, setting)
        return found

    def counters(self) -> list[KernelCount]:
        """Return what the candidate's processes counted, together."""
        calls: Counter[str] = Counter()
        n_bytes: Counter[str] = Counter()
        last: dict[str, KernelCount] = {}
        for entrant in self._entrants():
            for setting in self._needed(entrant) if entrant.side == "candidate" else ():
                for one in _counters(self._stage.turn(entrant, setting)):
                    calls[one.name] += one.calls
                    n_bytes[one.name] += one.bytes
                    last[one.name] = one
        return [replace(one, calls=calls[name], bytes=n_bytes[name]) for name, one in last.items()]

    def _entrants(self) -> list[Entrant]:
        return list(self._identities)

    def _needed(self, entrant: Entrant) -> dict[Setting, list[str]]:
        """Return setting -> names of the measures of a round that are taken in it."""
        found: dict[Setting, list[str]] = defaultdict(list)
        for measure in ROUND:
            found[self._chosen[entrant][measure.name]].append(measure.name)
        return found

    def _sequence(self, entrant: Entrant, setting: Setting, measures: Sequence[Measure]) -> dict[str, Sample]:
        """Take measures one after the other, on one sequence, in a process that has the machine for itself."""
        running = self._stage.turn(entrant, setting)
        return {measure.name: _sample(measure, running, self._task.work) for measure in measures}


def _sample(measure: Measure, running: Running, work: Work) -> Sample:
    """Take a measure, and what the engine read meanwhile if it counts that."""
    before = _counters(running)
    sample = measure.run(running, work)
    return replace(sample, reads=weight_reads(before, _counters(running))) if measure.reads else sample


def _counters(running: Running) -> list[KernelCount]:
    """Return the counters of an engine that has any: ours."""
    return running.engine.counters() if isinstance(running.engine, BitnetPyProcess) else []


def _keep(values: list[float], sample: Sample) -> None:
    if sample.raw is not None and sample.raw > 0:
        values.append(sample.raw)


def _turned(items: Sequence[_Item], index: int) -> list[_Item]:
    """Return the items in order, beginning with another one for each index."""
    first = index % len(items)
    return [*items[first:], *items[:first]]
