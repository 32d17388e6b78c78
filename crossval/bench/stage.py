"""The processes of a benchmark: one for each engine in each setting, of which one computes at a time."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from crossval.bench import threads
from crossval.bench.engine import Engine
from crossval.bench.measures import Running, Work
from crossval.bench.search import Idle, Setting
from crossval.passes import Numerics
from crossval.terms import LOGITS, Side


@dataclass(frozen=True)
class Entrant:
    """One engine in the benchmark. ``index``: which of the references, or against which of them it computes.

    ``numerics``: what the candidate computes like; None: its own way.
    """

    side: Side
    index: int
    numerics: Numerics | None = None


class OpenEngine(Protocol):
    """Starts an engine's process."""

    def __call__(self, entrant: Entrant, n_threads: int) -> AbstractContextManager[Engine]:
        """Return the engine, not yet started."""


class CannotPinError(Exception):
    """The threads of an engine cannot be pinned; the message says why."""


@dataclass
class _Process:
    running: Running
    stack: ExitStack
    pid: int
    frozen: bool = False


@dataclass
class Stage:
    """Starts processes, gives one of them the machine, and ends them all; a context manager."""

    open_engine: OpenEngine
    work: Work
    idle: dict[Entrant, Idle] = field(default_factory=dict)
    """What each engine was seen doing while another had the machine."""
    _processes: dict[tuple[Entrant, Setting], _Process] = field(default_factory=dict)

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.end_all()

    def start(self, entrant: Entrant, setting: Setting) -> Running:
        """Start a process while all others sleep.

        Raises:
            BadInputError, UnavailableError, EngineCrashError: from the engine.
        """
        self.rest()
        stack = ExitStack()
        started_s = time.perf_counter()
        engine = stack.enter_context(self.open_engine(entrant, setting.n_threads))
        running = Running(engine, started_s)
        self._processes[entrant, setting] = _Process(running, stack, engine.pid)
        return running

    def end(self, entrant: Entrant, setting: Setting) -> None:
        """End a process."""
        process = self._processes.pop((entrant, setting))
        self._thaw(process)
        process.stack.close()

    def end_all(self) -> None:
        """End every process."""
        for key in list(self._processes):
            self.end(*key)

    def rest(self) -> None:
        """Wait until all processes sleep, and stop those that do not."""
        self._rest(None)

    def turn(self, entrant: Entrant, setting: Setting) -> Running:
        """Return a process that has the machine for itself: all threads of the others sleep, or are stopped."""
        process = self._processes[entrant, setting]
        self._rest(process)
        self._thaw(process)
        return process.running

    def pin(self, entrant: Entrant, setting: Setting) -> None:
        """Give each thread of a process that works in a pass the core that the setting names.

        Raises:
            CannotPinError: other threads worked than the setting has, or the system does not allow it.
        """
        engine = self.turn(entrant, setting).engine
        self._pass(engine)
        before = threads.wakeups(engine.pid)
        self._pass(engine)
        found = threads.woken(before, threads.wakeups(engine.pid))
        if len(found) != setting.n_threads:
            raise CannotPinError(
                f"{len(found)} threads that last from pass to pass were found, {setting.n_threads} were expected"
            )
        try:
            threads.pin(found, setting.cores)
        except OSError as error:
            raise CannotPinError(f"the system does not allow it: {error.strerror or error}") from error
        self._pass(engine)
        if not threads.is_pinned(found, setting.cores):
            raise CannotPinError("the engine moved its threads or replaced them")

    def _pass(self, engine: Engine) -> None:
        """Run a pass from start to sleep."""
        engine.reset()
        engine.eval(self.work.prompt_ids, (LOGITS,))
        threads.settle([engine.pid])

    def _rest(self, active: _Process | None) -> None:
        """Wait until all processes but one sleep, and stop those that do not."""
        others = {key: one for key, one in self._processes.items() if one is not active and not one.frozen}
        busy = threads.settle([one.pid for one in others.values()])
        for (entrant, _), one in others.items():
            if one.pid in busy:
                threads.freeze(one.pid)
                one.frozen = True
            if self.idle.get(entrant) != "stopped":
                seen: Idle = "unseen" if threads.cpu_time_ns(one.pid) is None else "sleeps"
                self.idle[entrant] = "stopped" if one.frozen else seen

    @staticmethod
    def _thaw(process: _Process) -> None:
        if process.frozen:
            threads.thaw(process.pid)
            process.frozen = False
