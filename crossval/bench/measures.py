"""What is measured: one table entry per measure, and the work that all of them share.

A measure is a function that lets an engine do some work and returns its cost and its results. Every raw value is
better when smaller (seconds, bytes); ``figures`` derives figures and ratios from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_py.bench import peak_resident_bytes, random_ids
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.model.tolerance import PolicyName
from crossval.passes import PassRecord
from crossval.terms import LOGITS

N_FIRST = 16
"""Prompt tokens before the first logits of a fresh process."""
N_PROCESSES = 3
"""Fresh processes of each engine."""


@dataclass(frozen=True)
class Work:
    """What all engines do; the token ids follow from seed and vocabulary."""

    seed: int
    n_prompt: int
    n_decode: int
    """Tokens per way of decoding."""
    n_rounds: int
    """Measured rounds, after one warm-up round."""
    n_threads: int
    """The most threads that an engine may have."""
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
        """The tokens that all engines are fed after the prompt, whatever they would have chosen."""
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

    ``outputs`` are arrays to be compared with the other engine's.
    """

    raw: float | None
    outputs: tuple[npt.NDArray[Any], ...] = ()
    reads: Mapping[str, int] = field(default_factory=dict)
    """Operation -> bytes of weights read, by the engine's own counters."""


Run = Callable[[Running, Work], Sample]
Unit = Literal["tok/s", "s", "bytes"]
Scope = Literal["round", "process"]
"""Measured in every round, or in every fresh process."""


@dataclass(frozen=True)
class Measure:
    """One thing that is measured of every engine."""

    name: str
    meaning: str
    unit: Unit
    """Unit of the figure; ``tok/s`` is computed from seconds."""
    scope: Scope
    run: Run
    n_tokens: Callable[[Work], int]
    """Tokens per value."""
    n_passes: Callable[[Work], int]
    """Passes per value whose results are compared."""
    bounded: bool = False
    """Whether a minimum ratio can be required: ``--min-NAME-ratio``."""
    reads: bool = False
    """Whether the candidate's counters say which weights it read: single-token passes, bound by reading."""
    logits: bool = True
    """Whether the results are logits; else a choice among them, which only equal bits make equal."""

    def n_values(self, work: Work) -> int:
        """Return how many values of each engine are required."""
        return {"round": work.n_rounds, "process": work.n_processes}[self.scope]

    def n_compared(self, work: Work, policy: PolicyName) -> int:
        """Return how many passes have to be compared, those of the warm-up included.

        A choice is compared only between engines that state the same arithmetic: with another, a near tie may
        rightly be decided otherwise.
        """
        if not self.logits and policy != "same":
            return 0
        return self.n_passes(work) * (self.n_values(work) + (self.scope == "round"))


def _prefill(running: Running, work: Work) -> Sample:
    running.engine.reset()
    record = running.engine.eval(work.prompt_ids, (LOGITS,))
    return Sample(record.elapsed_s, (record.taps[LOGITS].array,))


def _decode(running: Running, work: Work) -> Sample:
    records = running.engine.eval_each(work.decode_ids)
    return Sample(_sum(records, work), tuple(record.taps[LOGITS].array for record in records))


def _greedy(running: Running, work: Work) -> Sample:
    """Our engine finds the next token without all logits. Others compute them all; choosing is not timed."""
    if isinstance(running.engine, BitnetPyProcess):
        found = running.engine.best_each(work.decode_ids)
        chosen = tuple(_choice(best.token_id, best.logit) for best in found)
        return Sample(sum(best.elapsed_s for best in found), chosen)
    records = running.engine.eval_each(work.decode_ids)
    rows = [record.taps[LOGITS].array[-1] for record in records]
    return Sample(_sum(records, work), tuple(_choice(int(row.argmax()), row.max()) for row in rows))


def _sum(records: Sequence[PassRecord], work: Work) -> float | None:
    """Return the seconds of all decoded tokens, None unless each has its own."""
    times = [record.elapsed_s for record in records if record.elapsed_s is not None]
    return sum(times) if len(times) == work.n_decode else None


def _choice(token_id: int, logit: float) -> npt.NDArray[Any]:
    """A token and its logit as one array, compared bitwise."""
    return np.array([token_id, logit], np.float64)


def _first_token(running: Running, work: Work) -> Sample:
    record = running.engine.eval(work.first_ids, (LOGITS,))
    return Sample(time.perf_counter() - running.started_s, (record.taps[LOGITS].array,))


def _memory(running: Running, work: Work) -> Sample:
    """As in a program that generates text: the first token from all logits, the others as ``greedy`` does."""
    _greedy(running, work)
    return Sample(peak_resident_bytes(running.engine.pid))


MEASURES = (
    Measure(
        "prefill", "prompt, one pass", "tok/s", "round", _prefill,
        n_tokens=lambda work: work.n_prompt, n_passes=lambda work: 1, bounded=True,
    ),
    Measure(
        "decode", "one token per pass", "tok/s", "round", _decode,
        n_tokens=lambda work: work.n_decode, n_passes=lambda work: work.n_decode, bounded=True, reads=True,
    ),
    Measure(
        "greedy", "the same, best token only", "tok/s", "round", _greedy,
        n_tokens=lambda work: work.n_decode, n_passes=lambda work: work.n_decode, bounded=True, reads=True,
        logits=False,
    ),
    Measure(
        "first_token", "start of a process to logits", "s", "process", _first_token,
        n_tokens=lambda work: work.n_first, n_passes=lambda work: 1,
    ),
    Measure(
        "peak_memory", "resident while generating", "bytes", "process", _memory,
        n_tokens=lambda work: work.n_first + work.n_decode, n_passes=lambda work: 0,
    ),
)  # fmt: skip
"""In the order of measuring: those of a round, or of a process, follow each other on one sequence."""
ROUND = tuple(measure for measure in MEASURES if measure.scope == "round")
PROCESS = tuple(measure for measure in MEASURES if measure.scope == "process")
FIRST_TOKEN = PROCESS[0]
TRIED = (*ROUND, FIRST_TOKEN)
"""What an engine is tried on before its threads are chosen."""
BOUNDED = tuple(measure.name for measure in MEASURES if measure.bounded)
