"""Run one engine several ways over the same tokens, and compare the runs tap by tap.

The same sequence may be fed in one pass, token by token or in pieces. ``assemble`` puts the passes of one run
together again, so that two runs can be compared tap by tap at the tokens both give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from crossval import capture
from crossval.capture import groups, run
from crossval.compare.rows import Skip, TapRow, compare_tap
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.taps import token_axis
from crossval.model.tolerance import Tolerance
from crossval.passes import PassPlan, PassRecord, Runner, TapArray, check_rows, cut_prompt, longest_pass

OpenRunner = Callable[..., AbstractContextManager[Runner]]
"""Returns a runner that has not been entered, or a context that lends one; takes ``n_threads`` and ``kernel``
where these are varied."""

Chunks = tuple[tuple[int, ...], ...]
"""A sequence of token ids, cut into the passes it is fed in."""


def at_once(runner: Runner, ids: Sequence[int]) -> Chunks:
    """Feed the tokens as a prompt: in one pass, or in as few as the engine takes."""
    return tuple(plan.token_ids for plan in cut_prompt(ids, longest_pass(runner)))


def one_by_one(ids: Sequence[int]) -> Chunks:
    """Feed one token per pass."""
    return tuple((token,) for token in ids)


@dataclass(frozen=True)
class Names:
    """Taps to record, and how many of them at a time, so that memory is bounded whatever the model."""

    all: tuple[str, ...]
    """In execution order."""
    bytes_of: Mapping[str, int] = field(default_factory=dict)
    """Tap -> bytes of one token; of attention scores for one key."""
    n_heads: int | None = None
    """Of attention; None when the engine does not give its scores."""

    @classmethod
    def of(cls, runner: Runner, n_layers: int, token: int) -> Names:
        """Return every tap; what each takes is read from a pass over one token."""
        names = tuple(taps.all_taps(n_layers))
        (record,) = run(runner, ((token,),), names)
        scores = record.taps.get("blk.0.kq")
        n_heads = None if scores is None else scores.array.shape[0]
        return cls(names, {name: tap.array.nbytes for name, tap in record.taps.items()}, n_heads)

    def groups(self, names: Sequence[str], *runs: Chunks) -> Iterator[list[str]]:
        """Yield taps in groups whose arrays fit into ``capture.MAX_BYTES`` in each of the runs."""
        passes = [list(zip(map(len, chunks), accumulate(map(len, chunks)), strict=True)) for chunks in runs]
        n_tokens = max(sum(n for n, _ in one) for one in passes)
        n_scores = max(sum(n * n_keys for n, n_keys in one) for one in passes)

        def size(name: str) -> int:
            return self.bytes_of.get(name, 0) * (n_scores if taps.has_keys(name) else n_tokens)

        return groups(names, size, capture.MAX_BYTES)


def require_live(runner: Runner) -> None:
    """Refuse a runner that can only give what was recorded.

    Raises:
        BadInputError: it is a trace.
    """
    if runner.plan is not None:
        raise BadInputError(
            f"{runner.identity.name} is a recorded trace, which cannot be run in another way; name a live engine"
        )


@dataclass(frozen=True)
class Whole:
    """One tap of a whole sequence; ``positions`` says which tokens its token axis holds, ascending."""

    array: npt.NDArray[np.float32]
    positions: tuple[int, ...]


def assemble(records: Sequence[PassRecord], name: str) -> Whole | None:
    """Put one tap of consecutive passes together; None when a pass lacks it.

    Attention scores are padded with zeros on the right: keys that came later.

    Raises:
        ValueError: an array is not float32, or its shape does not fit its pass or the other passes.
    """
    axis = token_axis(name)
    arrays: list[npt.NDArray[np.float32]] = []
    positions: list[int] = []
    for record in records:
        if name not in record.taps:
            return None
        tap, plan = record.taps[name], record.plan
        check_rows(name, tap.rows, len(plan.token_ids))
        rows = range(len(plan.token_ids)) if tap.rows is None else tap.rows
        shape = tap.array.shape
        if tap.array.dtype != np.float32 or len(shape) <= axis or shape[axis] != len(rows):
            raise ValueError(f"{name}: {tap.array.dtype} array of shape {shape} does not fit {len(rows)} tokens")
        arrays.append(tap.array)
        positions += [plan.start + row for row in rows]
    if taps.has_keys(name):
        width = max(array.shape[-1] for array in arrays)
        arrays = [_widen(array, width) for array in arrays]
    try:
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)
    except ValueError:
        shapes = sorted({array.shape for array in arrays})
        raise ValueError(f"{name}: the passes give arrays that do not fit each other: {shapes}") from None
    return Whole(whole, tuple(positions))


def _widen(array: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    missing = width - array.shape[-1]
    return array if missing <= 0 else np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def compare_runs(
    name: str, one: Sequence[PassRecord], other: Sequence[PassRecord], tolerance: Tolerance
) -> TapRow | Skip:
    """Compare a tap of two runs at the tokens both give; the second is the reference of the metrics.

    One run may be the beginning of the other. ``row.worst_token`` is a position in the sequence.
    """
    sides = []
    for which, records in (("first", one), ("second", other)):
        try:
            whole = assemble(records, name)
        except ValueError as error:
            return Skip(0, name, f"{which} run: {error}")
        if whole is None:
            return Skip(0, name, f"the engine did not give it in the {which} run")
        sides.append(whole)
    if taps.has_keys(name):
        width = max(side.array.shape[-1] for side in sides)
        sides = [Whole(_widen(side.array, width), side.positions) for side in sides]
    longer = max(one, other, key=_n_tokens)
    plan = PassPlan("prefill", tuple(t for record in longer for t in record.plan.token_ids), 0)
    first, second = (TapArray(side.array, side.positions) for side in sides)
    return compare_tap(name, 0, plan, first, second, tolerance)


@dataclass(frozen=True)
class Element:
    """One element of a tap in two runs; ``index`` is its place within the token."""

    position: int
    index: tuple[int, ...]
    values: tuple[float, float]


def worst_element(
    name: str, one: Sequence[PassRecord], other: Sequence[PassRecord], position: int | None = None
) -> Element | None:
    """Return the element that differs most at a token, by default at the first token with a difference.

    One that is not finite is the worst. None: nothing differs, or the runs do not fit each other.
    """
    try:
        sides = [assemble(one, name), assemble(other, name)]
    except ValueError:
        return None
    first, second = sides
    if first is None or second is None:
        return None
    axis, scores = token_axis(name), taps.has_keys(name)
    common = sorted(set(first.positions) & set(second.positions))
    for at in common if position is None else [p for p in common if p == position]:
        a, b = (np.take(side.array, side.positions.index(at), axis=axis) for side in (first, second))
        if scores:
            a, b = a[..., : at + 1], b[..., : at + 1]
        if a.shape != b.shape:
            return None
        bad = ~(np.isfinite(a) & np.isfinite(b))
        different = np.ascontiguousarray(a).view(np.uint32) != np.ascontiguousarray(b).view(np.uint32)
        if not (bad | different).any():
            continue
        with np.errstate(invalid="ignore"):
            distance = np.abs(a.astype(np.float64) - b)
        ranked = np.where(bad, np.inf, np.where(different, distance, -1.0))
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ranked)), ranked.shape))
        return Element(at, index, (float(a[index]), float(b[index])))
    return None


def _n_tokens(records: Sequence[PassRecord]) -> int:
    return sum(len(record.plan.token_ids) for record in records)
