"""A trace as a runner: gives what was recorded, and raises when asked for anything else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from crossval.errors import UnavailableError
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray, short_list
from crossval.traces.read import Trace, TraceInfo, TraceModel
from crossval.traces.tap_map import TapMap


class RecordedRunner:
    """Plays a trace back pass by pass. ``eval`` accepts only the tokens that were recorded, in their order."""

    status: Literal["live", "recorded"] = "recorded"

    def __init__(
        self, trace_dir: str | Path, tap_map: TapMap | None = None, model: TraceModel | None = None
    ) -> None:
        """Read ``trace.json`` of ``trace_dir``; ``tap_map`` and ``model`` as of ``Trace.open``.

        Raises:
            BadInputError: the trace is missing, malformed, or of another model.
        """
        self.trace = Trace.open(trace_dir, tap_map, model)
        self._next = 0

    @property
    def info(self) -> TraceInfo:
        """The contents of ``trace.json``."""
        return self.trace.info

    @property
    def identity(self) -> EngineIdentity:
        """The engine that was recorded."""
        return self.trace.info.engine

    @property
    def plan(self) -> tuple[PassPlan, ...]:
        """The recorded passes."""
        return self.trace.info.plan

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the recorded token ids when ``text`` is the recorded prompt.

        Raises:
            UnavailableError: for any other text, because a trace has no tokenizer.
        """
        if text != self.trace.info.prompt_text:
            raise UnavailableError(
                f"{self.trace.directory} has no tokenizer, only the token ids of its own prompt: "
                f"{_quote(self.trace.info.prompt_text)}"
            )
        return list(self.trace.info.prompt_ids)

    def reset(self) -> None:
        """Go back to the first recorded pass."""
        self._next = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Return the selected and recorded taps of the next pass; arrays are read when accessed.

        Raises:
            UnavailableError: the tokens are not those of the next recorded pass, or no pass is
            left.
            BadInputError: (on access) the pass file is not what ``trace.json`` says.
        """
        passes = self.trace.info.passes
        if self._next >= len(passes):
            raise UnavailableError(
                f"{self.trace.directory} records {len(passes)} passes, no pass {self._next}; "
                "record a longer trace or ask for fewer tokens"
            )
        recorded = passes[self._next]
        if tuple(token_ids) != recorded.plan.token_ids:
            raise UnavailableError(
                f"{self.trace.directory}: pass {self._next} records tokens {short_list(recorded.plan.token_ids)}, "
                f"not {short_list(token_ids)}; a trace cannot run other tokens"
            )
        taps = _Selected(self.trace.taps(self._next), frozenset(select))
        self._next += 1
        return PassRecord(recorded.plan, taps, recorded.elapsed_s)

    def __enter__(self) -> RecordedRunner:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.reset()


class _Selected(Mapping[str, TapArray]):
    """A view of the selected taps; nothing is read until one is accessed."""

    def __init__(self, taps: Mapping[str, TapArray], select: frozenset[str]) -> None:
        self._taps = taps
        self._names = [name for name in taps if name in select]

    def __getitem__(self, name: str) -> TapArray:
        if name not in self:
            raise KeyError(name)
        return self._taps[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _quote(text: str | None) -> str:
    return "(recorded without text)" if text is None else repr(text if len(text) <= 60 else text[:59] + "…")
