"""Runners that give less, or in another order, than the one they are made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Literal

from crossval.passes import EngineIdentity, PassPlan, PassRecord, Runner


class Wrapped:
    """Another runner, which stays open and is closed by whoever opened it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.n_done = 0

    @property
    def identity(self) -> EngineIdentity:
        """The engine's own."""
        return self.runner.identity

    @property
    def status(self) -> Literal["live", "recorded"]:
        """The engine's own."""
        return self.runner.status

    @property
    def plan(self) -> tuple[PassPlan, ...] | None:
        """The engine's own."""
        return self.runner.plan

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Ask the engine."""
        return self.runner.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        """Begin anew."""
        self.runner.reset()
        self.n_done = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next pass."""
        record = self.runner.eval(token_ids, select)
        self.n_done += 1
        return record

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None


class Hidden(Wrapped):
    """A runner some of whose arrays are treated as not recorded."""

    def __init__(self, runner: Runner, hidden: Collection[tuple[int, str]]) -> None:
        """``hidden``: (pass index, full tap name)."""
        super().__init__(runner)
        self._hidden = frozenset(hidden)

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next pass without what is hidden in it."""
        index = self.n_done
        return super().eval(token_ids, [name for name in select if (index, name) not in self._hidden])


class Reordered(Wrapped):
    """A recorded runner whose passes give each other's arrays."""

    def __init__(self, runner: Runner, source: Sequence[int]) -> None:
        """``source``: for each pass, the one whose arrays it gives.

        Raises:
            ValueError: the runner is live: it computes what it is asked.
        """
        super().__init__(runner)
        if runner.plan is None:
            raise ValueError("only recorded passes can be given in another order")
        self._source = tuple(source)
        self._plans = runner.plan
        self._select: frozenset[str] = frozenset()
        self._records: list[PassRecord] = []

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self._records = []

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Give the next pass; arrays of a recorded runner are read when accessed, so all passes are asked for."""
        index = self.n_done
        if not self._records or not frozenset(select) <= self._select:
            self.runner.reset()
            self._select = frozenset(select)
            self._records = [self.runner.eval(plan.token_ids, select) for plan in self._plans]
        self.n_done += 1
        source = self._source[index] if index < len(self._source) else index
        taps = self._records[source].taps
        return PassRecord(self._plans[index], {name: taps[name] for name in select if name in taps})


class Refed(Wrapped):
    """A runner that stands for one that was fed other tokens: it is fed its own, whatever it is asked to run."""

    def __init__(self, runner: Runner, plans: Sequence[PassPlan]) -> None:
        """``plans``: what it is really fed."""
        super().__init__(runner)
        self._plans = tuple(plans)

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next pass with the runner's own tokens."""
        return super().eval(self._plans[self.n_done].token_ids, select)
