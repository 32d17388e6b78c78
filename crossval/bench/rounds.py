"""Run both engines alternately and take every measure.

Machines are noisy: only measurements made side by side can be compared. Both engines run in every round, and which
engine starts alternates.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.bench import BandwidthProbe, weight_reads
from bitnet_py.model import KernelCount
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.bench.figures import BenchFindings, Taken
from crossval.bench.measures import MEASURES, Measure, Running, Sample, Scope, Work
from crossval.passes import EngineIdentity
from crossval.terms import SIDES, Progress, Side

REST_S = 0.3
"""Between engines: OpenMP workers of bitnet.cpp keep spinning for about 0.2 s after a pass."""


class OpenEngine(Protocol):
    """Starts an engine; the candidate rounds where the reference states that it rounds."""

    def __call__(self, side: Side, reference: EngineIdentity | None) -> AbstractContextManager[Engine]:
        """Return the engine, not yet started; ``reference``: its identity, None while it is unknown."""


@dataclass(frozen=True)
class BenchRun:
    """The findings, the engines measured, and the candidate's counters at the end."""

    findings: BenchFindings
    identities: Mapping[Side, EngineIdentity]
    counters: Sequence[KernelCount]


class _Tally:
    """Collects the values of one measure."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.raw: dict[Side, list[float]] = {side: [] for side in SIDES}
        self.n_compared = self.n_equal = 0
        self.reads: Counter[str] = Counter()

    def add(self, samples: Mapping[Side, Sample], reads: Mapping[str, int], *, counted: bool) -> None:
        """Add one value of each engine; results are also compared in the warm-up."""
        same = [_same(*pair) for pair in zip(*(samples[side].outputs for side in SIDES), strict=False)]
        self.n_compared += len(same)
        self.n_equal += sum(same)
        if not counted:
            return
        self.reads.update(reads)
        for side, sample in samples.items():
            if sample.raw is not None and sample.raw > 0:
                self.raw[side].append(sample.raw)

    def taken(self) -> Taken:
        """Return everything collected."""
        raw = {side: tuple(values) for side, values in self.raw.items()}
        return Taken(raw, self.n_compared, self.n_equal, dict(self.reads))


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Return whether two results are finite and bit-identical."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes() and bool(np.isfinite(a).all())


def run_bench(
    open_engine: OpenEngine,
    work: Work,
    *,
    kernel: str | None,
    min_ratios: Mapping[str, float | None],
    progress: Progress,
) -> BenchRun:
    """Measure both engines.

    Args:
        open_engine: starts an engine's process: one of each engine for the rounds, then the fresh ones.
        work: tokens, rounds, threads.
        kernel: the kernel family requested of the candidate.
        min_ratios: by name of the measure; None: any.
        progress: called with the current activity, the steps done, and their total.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: from the engines.
    """
    tallies = {measure.name: _Tally(measure) for measure in MEASURES}
    reads = BandwidthProbe(work.n_threads)
    total, read_s = 1 + work.n_rounds + work.n_processes, []
    with ExitStack() as stack:
        running: dict[Side, Running] = {}
        identities: dict[Side, EngineIdentity] = {}
        for side in ("reference", "candidate"):
            engine = stack.enter_context(open_engine(side, identities.get("reference")))
            running[side], identities[side] = Running(engine, time.perf_counter()), engine.identity
        for index in range(work.n_rounds + 1):
            progress("rounds", index, total)
            _round(running, _order(index), work, tallies, counted=index > 0)
            if index:
                time.sleep(REST_S)
                read_s.append(reads.seconds())
        counters = _counters(running["candidate"])
    for index in range(work.n_processes):
        progress("fresh processes", 1 + work.n_rounds + index, total)
        found_of: dict[Side, dict[str, Sample]] = {}
        for side in _order(index):
            time.sleep(REST_S)
            started = time.perf_counter()
            with open_engine(side, identities["reference"]) as engine:
                fresh = Running(engine, started)
                found_of[side] = {measure.name: measure.run[side](fresh, work) for measure in _of("process")}
        for measure in _of("process"):
            tallies[measure.name].add({side: found_of[side][measure.name] for side in SIDES}, {}, counted=True)
    progress("done", total, total)
    taken = {name: tally.taken() for name, tally in tallies.items()}
    findings = BenchFindings(work, kernel, taken, reads.n_bytes, tuple(read_s), min_ratios)
    return BenchRun(findings, identities, counters)


def _of(scope: Scope) -> list[Measure]:
    return [measure for measure in MEASURES if measure.scope == scope]


def _order(index: int) -> tuple[Side, ...]:
    return SIDES if index % 2 else SIDES[::-1]


def _round(
    running: Mapping[Side, Running],
    order: Sequence[Side],
    work: Work,
    tallies: Mapping[str, _Tally],
    *,
    counted: bool,
) -> None:
    """Take all measures of one engine, then of the other, and compare their results."""
    samples: dict[str, dict[Side, Sample]] = {measure.name: {} for measure in _of("round")}
    reads: dict[str, dict[str, int]] = {}
    for side in order:
        time.sleep(REST_S)
        for measure in _of("round"):
            before = _counters(running[side])
            samples[measure.name][side] = measure.run[side](running[side], work)
            if measure.reads and side == "candidate":
                reads[measure.name] = weight_reads(before, _counters(running[side]))
    for name, found in samples.items():
        tallies[name].add(found, reads.get(name, {}), counted=counted)


def _counters(running: Running) -> list[KernelCount]:
    """Return the counters of an engine that has any: ours."""
    return running.engine.counters() if isinstance(running.engine, BitnetPyProcess) else []
