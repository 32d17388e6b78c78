"""Engines find their threads, take turns, and are quiet in between: with made-up engines on a made-up machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from crossval.bench import rounds, threads
from crossval.bench.engine import Engine
from crossval.bench.measures import ROUND, Work
from crossval.bench.rounds import BenchRun, Task, run_bench
from crossval.bench.search import N_TRIALS, Setting
from crossval.bench.stage import Entrant
from crossval.errors import EngineCrashError
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray
from crossval.terms import LOGITS

WORK = Work(seed=0, n_prompt=4, n_decode=2, n_rounds=3, n_threads=2, vocab_size=50, n_processes=2)
MARCH, MAIN = Numerics(8, False), Numerics(8, False, generation="main")
PINNED = Setting(2, (3, 5))
ONE, FREE = Setting(1), Setting(2)


@dataclass
class Machine:
    """Two cores, engines on them, and what happened."""

    seconds: dict[tuple[str, Setting], tuple[float, float]] = field(default_factory=dict)
    """Engine and setting -> seconds of a prompt and of a decoded token; else 1 and 1."""
    numerics: dict[str, Numerics] = field(default_factory=dict)
    spins: set[str] = field(default_factory=set)
    """Engines whose threads never sleep."""
    lasting: bool = True
    """Whether threads last from pass to pass."""
    crash: str | None = None
    log: list[tuple[Any, ...]] = field(default_factory=list)
    running: dict[int, FakeEngine] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    next_pid: int = 1000

    @contextmanager
    def open(self, entrant: Entrant, n_threads: int) -> Iterator[Engine]:
        """Start an engine."""
        engine = FakeEngine(self, entrant, n_threads, self.next_pid)
        self.next_pid += 100
        self.running[engine.pid] = engine
        self.log.append(("start", engine.name, n_threads))
        try:
            yield engine
        finally:
            assert engine.pid not in self.frozen, "a stopped process cannot end by itself"
            del self.running[engine.pid]

    def settle(self, pids: Collection[int]) -> list[int]:
        return [pid for pid in pids if self.running[pid].name in self.spins]

    def wakeups(self, pid: int) -> dict[int, int]:
        engine = self.running[pid]
        first = pid if self.lasting else pid + engine.n_passes
        return {pid + 50: 1, **{first + i: engine.n_passes for i in range(engine.n_threads)}}

    def pin(self, found: Sequence[int], cores: Sequence[int]) -> None:
        self.running[found[0]].cores = tuple(cores)

    def freeze(self, pid: int) -> None:
        self.frozen.add(pid)
        self.log.append(("freeze", self.running[pid].name))

    def thaw(self, pid: int) -> None:
        self.frozen.discard(pid)


@dataclass
class FakeEngine:
    machine: Machine
    entrant: Entrant
    n_threads: int
    pid: int
    cores: tuple[int, ...] = ()
    n_past: int = 0
    n_passes: int = 0

    @property
    def name(self) -> str:
        return f"{self.entrant.side} {self.entrant.index}"

    @property
    def identity(self) -> EngineIdentity:
        numerics = self.entrant.numerics or self.machine.numerics.get(self.name, MARCH)
        return EngineIdentity(self.name, numerics=numerics, settings={"n_threads": self.n_threads, "n_ctx": 9})

    def reset(self) -> None:
        self.n_past = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        machine = self.machine
        assert self.pid not in machine.frozen, "measured while it was stopped"
        others = [one for one in machine.running.values() if one is not self and one.name in machine.spins]
        assert all(one.pid in machine.frozen for one in others), "another engine spins"
        if machine.crash == self.name:
            raise EngineCrashError("crashed")
        seconds = machine.seconds.get((self.name, Setting(self.n_threads, self.cores)), (1.0, 1.0))
        plan = PassPlan("decode" if self.n_past else "prefill", tuple(token_ids), self.n_past)
        if not self.n_past:
            machine.log.append(("prompt", self.name, Setting(self.n_threads, self.cores)))
        elapsed_s = seconds[bool(self.n_past)]
        self.n_past += len(token_ids)
        self.n_passes += 1
        logits = np.full((1, 50), self.n_past, np.float32)
        return PassRecord(plan, {LOGITS: TapArray(logits, (len(token_ids) - 1,))}, elapsed_s)

    def eval_each(self, token_ids: Sequence[int]) -> list[PassRecord]:
        return [self.eval([token], (LOGITS,)) for token in token_ids]


class Probe:
    n_bytes = 1000

    def __init__(self, n_threads: int) -> None:
        assert n_threads == WORK.n_threads

    def seconds(self) -> float:
        return 0.1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for name in ("settle", "wakeups", "pin", "freeze", "thaw"):
        monkeypatch.setattr(threads, name, getattr(made, name))
    monkeypatch.setattr(threads, "cpu_time_ns", lambda pid: 1)
    monkeypatch.setattr(threads, "is_pinned", lambda found, cores: True)
    monkeypatch.setattr(rounds, "usable_cores", lambda: [3, 5])
    monkeypatch.setattr(rounds, "can_place", lambda: True)
    monkeypatch.setattr(rounds, "BandwidthProbe", Probe)
    monkeypatch.setattr("crossval.bench.measures.peak_resident_bytes", lambda pid: 1000)
    return made


def run(machine: Machine, **task: Any) -> BenchRun:
    def start(entrant: Entrant, n_threads: int) -> AbstractContextManager[Engine]:
        return machine.open(entrant, n_threads)

    found = run_bench(start, Task(WORK, n_layers=2, **task), lambda *_: None)
    assert machine.running == {}
    assert machine.frozen == set()
    return found


def test_each_engine_gets_what_is_fastest_for_each_measure(machine: Machine) -> None:
    machine.seconds = {
        ("candidate 0", PINNED): (0.5, 0.8), ("candidate 0", FREE): (0.6, 0.7),
        ("reference 0", FREE): (0.9, 5.0), ("reference 0", PINNED): (2.0, 2.0),
    }  # fmt: skip
    done = run(machine)
    (pair,) = done.findings.pairs
    assert pair.search is not None
    chosen = {side: [search.chosen(m.name) for m in ROUND] for side, search in pair.search.items()}
    assert chosen == {"candidate": [PINNED, FREE, FREE], "reference": [FREE, ONE, ONE]}
    assert pair.taken["prefill"].raw == {"candidate": (0.5,) * 3, "reference": (0.9,) * 3}
    assert pair.taken["decode"].raw == {"candidate": (1.4,) * 3, "reference": (2.0,) * 3}
    assert pair.taken["greedy"].raw == pair.taken["decode"].raw
    assert [len(one.raw["decode"]) for one in pair.search["candidate"].tried] == [N_TRIALS] * 3
    assert [len(one.raw["first_token"]) for one in pair.search["candidate"].tried] == [1, 1, 0]
    assert all(taken.n_equal == taken.n_compared for taken in pair.taken.values())
    assert pair.taken["prefill"].n_compared == WORK.n_rounds + 1
    assert pair.search["candidate"].idle == "sleeps"
    # what all processes of an engine share
    assert done.identities[0]["candidate"].settings == {"n_ctx": 9}


def test_a_number_of_threads_that_was_asked_for(machine: Machine) -> None:
    machine.seconds = {("reference 0", FREE): (5.0, 5.0), ("reference 0", PINNED): (4.0, 6.0)}
    (pair,) = run(machine, n_threads=2).findings.pairs
    assert pair.search is not None
    assert [pair.search["reference"].chosen(m.name) for m in ROUND] == [PINNED, FREE, FREE]
    assert pair.search["reference"].one_thread("decode") == (2.0,) * N_TRIALS


def test_threads_that_do_not_last_are_not_pinned(machine: Machine) -> None:
    machine.lasting = False
    machine.seconds = {("candidate 0", PINNED): (0.1, 0.1)}
    (pair,) = run(machine).findings.pairs
    assert pair.search is not None
    search = pair.search["candidate"]
    assert [one.setting for one in search.tried] == [ONE, FREE]
    assert search.not_pinned is not None
    assert "threads that last from pass to pass" in search.not_pinned


def test_an_engine_that_spins_is_stopped_while_others_run(machine: Machine) -> None:
    machine.spins = {"reference 0"}
    (pair,) = run(machine).findings.pairs
    assert pair.search is not None
    assert {side: search.idle for side, search in pair.search.items()} == {
        "candidate": "sleeps", "reference": "stopped",
    }  # fmt: skip
    assert ("freeze", "reference 0") in machine.log
    assert ("freeze", "candidate 0") not in machine.log


def test_every_process_ends_when_one_crashes(machine: Machine) -> None:
    machine.spins, machine.crash = {"reference 0"}, "candidate 0"
    with pytest.raises(EngineCrashError):
        run(machine)
    assert machine.running == {}


def rounds_of(machine: Machine) -> list[str]:
    """Return which engine ran in the rounds, one entry per turn."""
    names = [entry[1] for entry in machine.log if entry[0] == "prompt"]
    n_fresh = WORK.n_processes * len(set(names))
    n_rounds = (WORK.n_rounds + 1) * len(set(names))
    return names[-n_fresh - n_rounds : -n_fresh]


def test_three_engines_take_turns(machine: Machine) -> None:
    machine.seconds[("reference 1", ONE)] = (3.0, 3.0)
    done = run(machine, references_follow=(False, False), n_threads=1)
    first, second = done.findings.pairs
    assert first.taken["decode"].raw["candidate"] == second.taken["decode"].raw["candidate"]
    assert second.taken["decode"].raw["reference"] == (6.0,) * 3
    names = ["reference 0", "reference 1", "candidate 0"]
    assert rounds_of(machine) == [names[(start + i) % 3] for start in range(4) for i in range(3)]


def test_the_candidate_computes_as_each_reference_does(machine: Machine) -> None:
    machine.numerics = {"reference 1": MAIN}
    done = run(machine, references_follow=(False, False, False), n_threads=1)
    assert [one["candidate"].numerics for one in done.identities] == [MARCH, MAIN, MARCH]
    assert [one["candidate"].name for one in done.identities] == ["candidate 0", "candidate 1", "candidate 0"]
    assert [pair.policy for pair in done.findings.pairs] == ["same"] * 3


def test_a_candidate_of_its_own_arithmetic_is_held_to_bounds(machine: Machine) -> None:
    machine.numerics = {"candidate 0": MAIN}
    done = run(machine, candidate_follows=False, n_threads=1)
    assert [pair.policy for pair in done.findings.pairs] == ["independent"]
    assert done.findings.pairs[0].taken["greedy"].n_compared == 0


def test_a_reference_may_follow_the_candidate(machine: Machine) -> None:
    machine.numerics = {"candidate 0": MAIN}
    done = run(machine, candidate_follows=False, references_follow=(True,), n_threads=1)
    assert done.identities[0]["reference"].numerics == MAIN
    assert machine.log[0] == ("start", "candidate 0", 1)
