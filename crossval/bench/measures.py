"""What is measured: one table entry per measure, and the work that all of them share.

A measure is a function per engine that does some work and returns its cost and its results. Every raw value is
better when smaller (seconds, bytes); ``figures`` derives figures and ratios from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_py.bench import peak_resident_bytes, random_ids
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.terms import Side

LOGITS = ("result_output",)
N_FIRST = 16
"""Prompt tokens before the first logits of a fresh process."""
N_PROCESSES = 3
"""Fresh processes of each engine."""


@dataclass(frozen=True)
class Work:
    """What both engines do; the token ids follow from seed and vocabulary."""

    seed: int
    n_prompt: int
    n_decode: int
    """Tokens per way of decoding."""
    n_rounds: int
    """Measured rounds, after one warm-up round."""
    n_threads: int
    vocab_size: int
    n_first: int = N_FIRST
    n_processes: int = N_PROCESSES

    @property
    def n_context(self) -> int:
        """Tokens that the context has to hold: decoding runs twice, the second time greedily."""
        return max(self.n_prompt + 2 * self.n_decode, self.n_first + self.n_decode)

    @cached_property
    def _ids(self) -> list[int]:
        return random_ids(self.seed, self.n_context, self.vocab_size)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt."""
        return self._ids[: self.n_prompt]

    @property
    def decode_ids(self) -> list[int]:
        """The tokens that both engines are fed after the prompt, whatever they would have chosen."""
        return self._ids[self.n_prompt : self.n_prompt + self.n_decode]

    @property
    def first_ids(self) -> list[int]:
        """The prompt of a fresh process."""
        return self._ids[: self.n_first]


@dataclass(frozen=True)
class Running:
    """An engine being measured; ``started_s``: ``time.perf_counter`` when its process was started."""

    engine: Engine
    started_s: float


@dataclass(frozen=True)
class Sample:
    """One value of a measure: seconds or bytes (None: unknown), and the results, pass by pass.

    ``outputs`` are arrays that must be bit-identical to the other engine's.
    """

    raw: float | None
    outputs: tuple[npt.NDArray[Any], ...] = ()


Run = Callable[[Running, Work], Sample]
Unit = Literal["tok/s", "s", "bytes"]
Scope = Literal["round", "process"]
"""Measured in every round, or in every fresh process."""


@dataclass(frozen=True)
class Measure:
    """One thing that is measured of both engines."""

    name: str
    meaning: str
    unit: Unit
    """Unit of the figure; ``tok/s`` is computed from seconds."""
    scope: Scope
    run: Mapping[Side, Run]
    n_tokens: Callable[[Work], int]
    """Tokens per value."""
    n_passes: Callable[[Work], int]
    """Passes per value whose results are compared."""
    bounded: bool = False
    """Whether a minimum ratio can be required: ``--min-NAME-ratio``."""
    reads: bool = False
    """Whether the candidate's counters say which weights it read: single-token passes, bound by reading."""

    def n_values(self, work: Work) -> int:
        """Return how many values of each engine are required."""
        return {"round": work.n_rounds, "process": work.n_processes}[self.scope]

    def n_compared(self, work: Work) -> int:
        """Return how many passes have to be compared, those of the warm-up included."""
        return self.n_passes(work) * (self.n_values(work) + (self.scope == "round"))


def _both(run: Run) -> Mapping[Side, Run]:
    return {"candidate": run, "reference": run}


def _prefill(running: Running, work: Work) -> Sample:
    running.engine.reset()
    record = running.engine.eval(work.prompt_ids, LOGITS)
    return Sample(record.elapsed_s, (record.taps[LOGITS[0]].array,))


def _decode(running: Running, work: Work) -> Sample:
    records = running.engine.eval_each(work.decode_ids)
    outputs = tuple(record.taps[LOGITS[0]].array for record in records)
    times = [record.elapsed_s for record in records if record.elapsed_s is not None]
    return Sample(sum(times) if len(times) == work.n_decode else None, outputs)


def _greedy_search(running: Running, work: Work) -> Sample:
    """Our engine: the next token without all logits."""
    assert isinstance(running.engine, BitnetPyProcess)
    found = running.engine.best_each(work.decode_ids)
    outputs = tuple(_choice(best.token_id, best.logit) for best in found)
    return Sample(sum(best.elapsed_s for best in found), outputs)


def _greedy_by_logits(running: Running, work: Work) -> Sample:
    """The reference computes all logits, as it always does; choosing among them is not timed."""
    records = running.engine.eval_each(work.decode_ids)
    rows = [record.taps[LOGITS[0]].array[-1] for record in records]
    times = [record.elapsed_s for record in records if record.elapsed_s is not None]
    outputs = tuple(_choice(int(row.argmax()), row.max()) for row in rows)
    return Sample(sum(times) if len(times) == work.n_decode else None, outputs)


def _choice(token_id: int, logit: float) -> npt.NDArray[Any]:
    """A token and its logit as one array, compared bitwise."""
    return np.array([token_id, logit], np.float64)


def _first_token(running: Running, work: Work) -> Sample:
    record = running.engine.eval(work.first_ids, LOGITS)
    return Sample(time.perf_counter() - running.started_s, (record.taps[LOGITS[0]].array,))


def _memory_searching(running: Running, work: Work) -> Sample:
    """Our engine as in ``bitnet run``: the first token from all logits, the others by its certified LM head."""
    assert isinstance(running.engine, BitnetPyProcess)
    running.engine.best_each(work.decode_ids)
    return Sample(peak_resident_bytes(running.engine.pid))


def _memory_by_logits(running: Running, work: Work) -> Sample:
    running.engine.eval_each(work.decode_ids)
    return Sample(peak_resident_bytes(running.engine.pid))


MEASURES = (
    Measure(
        "prefill", "prompt, one pass", "tok/s", "round", _both(_prefill),
        n_tokens=lambda work: work.n_prompt, n_passes=lambda work: 1, bounded=True,
    ),
    Measure(
        "decode", "one token per pass", "tok/s", "round", _both(_decode),
        n_tokens=lambda work: work.n_decode, n_passes=lambda work: work.n_decode, bounded=True, reads=True,
    ),
    Measure(
        "greedy", "the same, best token only", "tok/s", "round",
        {"candidate": _greedy_search, "reference": _greedy_by_logits},
        n_tokens=lambda work: work.n_decode, n_passes=lambda work: work.n_decode, bounded=True, reads=True,
    ),
    Measure(
        "first_token", "start of a process to logits", "s", "process", _both(_first_token),
        n_tokens=lambda work: work.n_first, n_passes=lambda work: 1,
    ),
    Measure(
        "peak_memory", "resident while generating", "bytes", "process",
        {"candidate": _memory_searching, "reference": _memory_by_logits},
        n_tokens=lambda work: work.n_first + work.n_decode, n_passes=lambda work: 0,
    ),
)  # fmt: skip
"""In the order of measuring: those of a round, or of a process, follow each other on one sequence."""
BOUNDED = tuple(measure.name for measure in MEASURES if measure.bounded)
