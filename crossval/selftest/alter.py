"""Altered outputs: a correct engine, one of whose arrays is modified on the way out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from crossval.model.taps import token_axis
from crossval.passes import EngineIdentity, PassKind, PassPlan, PassRecord, Runner, TapArray

Array = npt.NDArray[np.float32]
Change = Callable[[Array, int], Array]
"""Takes a copy of an array and its token axis, returns the altered array."""
Feed = Callable[[Sequence[int]], list[int]]
"""Takes the tokens an engine is asked to run, returns those that it does run."""


def zero_remainder(x: Array, axis: int) -> Array:
    """Zero the last ``n_tokens mod 4`` rows."""
    keep = np.arange(x.shape[axis]) < x.shape[axis] // 4 * 4
    shape = [1] * x.ndim
    shape[axis] = keep.size
    zeroed: Array = x * keep.reshape(shape)
    return zeroed


def lose_half(x: Array, axis: int) -> Array:
    """Zero the second half of an axis that does not count tokens: of the heads, or of the features."""
    features = 0 if axis == 1 else 1
    np.moveaxis(x, features, 0)[x.shape[features] // 2 :] = 0
    return x


def set_value(index: int, value: float) -> Change:
    """Set one value."""

    def change(x: Array, axis: int) -> Array:
        x.reshape(-1)[index] = value
        return x

    return change


def flip_sign(x: Array, axis: int) -> Array:
    """Flip the sign of the last token's largest value; that token sees every key, none is masked."""
    last = np.moveaxis(x, axis, 0)[-1]
    last[np.unravel_index(np.argmax(np.abs(last)), last.shape)] *= -1
    return x


def through_f16(x: Array, axis: int) -> Array:
    """Round to binary16."""
    return x.astype(np.float16).astype(np.float32)


def through_bf16(x: Array, axis: int) -> Array:
    """Round to bfloat16, halves up."""
    return (x.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)


def one_in_ten_thousand(x: Array, axis: int) -> Array:
    """Make every value 0.01 % too large."""
    larger: Array = x * np.float32(1.0001)
    return larger


def shift_features(x: Array, axis: int) -> Array:
    """Shift every value by one place."""
    return np.roll(x, 1, -1)


def lose_row(x: Array, axis: int) -> Array:
    """Omit the last token's row."""
    return np.delete(x, -1, axis)


class Altered:
    """An engine one of whose outputs is altered in every pass of a kind, or that runs other tokens than requested.

    The engine itself is opened and closed by its owner.
    """

    def __init__(
        self,
        engine: Runner,
        tap: str,
        pass_kind: PassKind,
        change: Change | None = None,
        feed: Feed | None = None,
    ) -> None:
        self._engine = engine
        self._tap = tap
        self._pass_kind = pass_kind
        self._change = change
        self._feed = feed

    def __enter__(self) -> Altered:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    @property
    def identity(self) -> EngineIdentity:
        """The engine's."""
        return self._engine.identity

    @property
    def status(self) -> Literal["live", "recorded"]:
        """The engine's."""
        return self._engine.status

    @property
    def plan(self) -> tuple[PassPlan, ...] | None:
        """The engine's."""
        return self._engine.plan

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids by the engine's tokenizer."""
        return self._engine.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        """Empty the engine's cache."""
        self._engine.reset()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass and return it altered; raises what the engine raises."""
        record = self._engine.eval(self._feed(token_ids) if self._feed else token_ids, select)
        record = replace(record, plan=replace(record.plan, token_ids=tuple(int(token) for token in token_ids)))
        if self._change is None or self._tap not in record.taps or record.plan.kind != self._pass_kind:
            return record
        old = record.taps[self._tap]
        new = np.ascontiguousarray(self._change(old.array.copy(), token_axis(self._tap)))
        return replace(record, taps={**record.taps, self._tap: TapArray(new, old.rows)})
