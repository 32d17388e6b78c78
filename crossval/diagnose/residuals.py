"""Residuals: mistakes made one at a time in a segment, and how far the end of each is from what was recorded.

After a mistake, and after the last operation that reads the cache or positions, every operation works row by row.
From there on the tokens of many mistakes are computed as rows of one array, and mistakes that have changed the
same values alike by then are one.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from crossval.diagnose.replay import Mistake, Mode, Replay
from crossval.diagnose.variants import Inapplicable
from crossval.model.kinds import FloatArray, widen
from crossval.model.op import Op
from crossval.model.taps import CONTEXT_INPUTS, is_state
from crossval.passes import TapArray

N_ROWS = 64
"""Tokens computed together, at least those of one mistake; bounds memory."""
FAILED = (Inapplicable, ValueError, IndexError)
"""A mistake cannot be made; the last two: arrays whose shapes do not match."""
Group = tuple[int, tuple[tuple[str, tuple[int, ...] | None, tuple[int, ...]], ...]]
"""The next operation's number, and name, tokens and shape of what was changed: these can be stacked."""


@dataclass(frozen=True)
class Trial:
    """A mistake to be made."""

    mistake: Mistake
    probe: Sequence[int] | None
    """Tokens of the last pass that are enough; None: all."""


def residuals(replay: Replay, trials: Sequence[Trial], mode: Mode) -> list[FloatArray | None]:
    """Return for each trial the relative L2 distance of every token; None: the mistake cannot be made."""
    found = _Trials(replay, mode)
    with np.errstate(all="ignore"):
        for number, trial in enumerate(trials):
            found.begin(number, trial)
        known = found.finish()
    return [known.get(number) for number in range(len(trials))]


class _Trials:
    """Trials computed as far as their mistakes, waiting to be stacked."""

    def __init__(self, replay: Replay, mode: Mode) -> None:
        self._replay, self._mode = replay, mode
        self._mixed = max((i for i, op in enumerate(replay.segment) if not _by_rows(op)), default=-1)
        self._alike: defaultdict[bytes, list[int]] = defaultdict(list)
        """Numbers of the trials by what they changed."""
        self._waiting: defaultdict[Group, dict[bytes, Mapping[str, TapArray]]] = defaultdict(dict)
        self._known: dict[bytes, FloatArray | None] = {}

    def begin(self, number: int, trial: Trial) -> None:
        """Compute a trial as far as its mistake goes."""
        replay, segment, at = self._replay, self._replay.segment, trial.mistake.at
        stop = 1 + max(self._mixed, *(i for i, op in enumerate(segment) if op.output in at), -1)
        try:
            changed = replay.changes(trial.mistake, self._mode, trial.probe, stop)
            if changed is None:
                return
            read = {name for op in segment[stop:] for name in op.inputs} | {replay.tap}
            live = {name: changed[name] for name in sorted(read & set(changed))}
        except FAILED:
            return
        group = (stop, tuple((name, tap.rows, tap.array.shape) for name, tap in live.items()))
        key = blake2b(repr(group).encode())
        for tap in live.values():
            key.update(tap.array.tobytes())
        digest = key.digest()
        self._alike[digest].append(number)
        if len(self._alike[digest]) > 1:
            return
        waiting = self._waiting[group]
        waiting[digest] = live
        if (len(waiting) + 1) * max((len(tap.array) for tap in live.values()), default=N_ROWS) > N_ROWS:
            self._end(group)

    def finish(self) -> dict[int, FloatArray | None]:
        """Compute the ends of all trials; return their distances by number."""
        for group in list(self._waiting):
            self._end(group)
        return {number: self._known[key] for key, numbers in self._alike.items() for number in numbers}

    def _end(self, group: Group) -> None:
        waiting = self._waiting.pop(group)
        try:
            ends = self._stacked(group[0], list(waiting.values()))
            self._known.update(zip(waiting, map(self._replay.distance, ends), strict=True))
        except FAILED:  # all of a group have the same shapes
            self._known.update(dict.fromkeys(waiting))

    def _stacked(self, stop: int, trials: Sequence[Mapping[str, TapArray]]) -> list[TapArray]:
        """Compute the operations from ``stop`` on for several trials at once; return the segment's end of each."""
        replay, n = self._replay, len(trials)
        base = replay.baseline(self._mode).values[-1]
        changed = {
            name: TapArray(np.concatenate([trial[name].array for trial in trials]), tap.rows)
            for name, tap in trials[0].items()
        }
        for op in replay.segment[stop:]:
            if op.output != replay.tap and not any(name in changed for name in op.inputs):
                continue
            right = replay.context(op, self._mode)
            rows = replay.rows_of(op, ChainMap(changed, base))
            raw = tuple(
                _rows_of_each(widen(changed[name].array), n, replay.tokens_of(changed[name]), rows)
                if name in changed
                else np.concatenate([right.tap(name, rows)] * n)
                for name in op.inputs
            )
            rounded = replay.rounded(op, len(rows), self._mode)
            context = replace(right, rows=rows * n, raw=raw, rounded=rounded, recorded=np.empty(0))
            changed[op.output] = TapArray(replay.shaped(op, context.expected, self._mode), rows)
        end = changed[replay.tap]
        return [TapArray(part, end.rows) for part in np.split(end.array, n)]


def _by_rows(op: Op) -> bool:
    """Return whether a token's result depends on nothing but the token's own inputs."""
    return op.token_axis == 0 and not any(is_state(name) or name in CONTEXT_INPUTS for name in op.inputs)


def _rows_of_each(stacked: FloatArray, n: int, have: Sequence[int], rows: Sequence[int]) -> FloatArray:
    """Return some tokens of each of ``n`` arrays stacked, whose tokens are ``have``."""
    if tuple(have) == tuple(rows):
        return stacked
    each = stacked.reshape(n, len(have), *stacked.shape[1:])
    return each[:, [have.index(row) for row in rows]].reshape(-1, *stacked.shape[1:])
