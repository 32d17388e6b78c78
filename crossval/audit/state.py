"""What is known of the passes of one engine under audit: recorded tensors, and those still to be computed.

A tensor that an engine did not record is *pending*: the next recorded one that depends on it is judged as the
output of a segment of several operations (``segments``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.segments import Part
from crossval.model.op import Op
from crossval.model.taps import is_state, take_rows
from crossval.passes import PassPlan, TapArray

Covered = frozenset[tuple[int, str]]
"""Operations, as (pass index, output tap), whose results were computed here and not recorded."""


@dataclass(frozen=True)
class Value:
    """An array an operation reads, as the engine recorded it."""

    array: npt.NDArray[Any]
    rows: tuple[int, ...]
    """Token indices within the pass; for KV state, cells."""


@dataclass(frozen=True)
class Pending:
    """A tensor that was not recorded: what computes it."""

    op: Op


@dataclass(frozen=True)
class Computed:
    """A tensor that was not recorded, computed as part of a segment that has been judged since."""

    part: Part
    covered: Covered


@dataclass
class PassState:
    """What is known of one pass of one engine while its layers are audited in order."""

    index: int
    plan: PassPlan
    values: dict[str, Value | Pending | Computed] = field(default_factory=dict)
    flips: dict[tuple[str, int], frozenset[int]] = field(default_factory=dict)
    """Int8 flips that were found in segments: (quantised tap, row) to features."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return len(self.plan.token_ids)

    @property
    def all_rows(self) -> tuple[int, ...]:
        """Every token index of the pass."""
        return tuple(range(self.n_tokens))

    def value(self, name: str) -> Value | Pending | Computed | None:
        """Return what an op reads under this name; None when nothing is known of it."""
        if name == "token_ids":
            return Value(np.asarray(self.plan.token_ids, np.int64), self.all_rows)
        if name == "positions":
            return Value(np.asarray(self.plan.positions, np.int64), self.all_rows)
        return self.values.get(name)


def recorded_value(tap: TapArray, n_tokens: int) -> Value:
    """Wrap a recorded tap."""
    return Value(tap.array, tuple(range(n_tokens)) if tap.rows is None else tap.rows)


def gather(op: Op, state: PassState, rows: Sequence[int]) -> tuple[npt.NDArray[Any], ...] | str:
    """Collect an op's inputs, all recorded, cut to the rows of its output; a string says which one lacks rows."""
    arrays: list[npt.NDArray[Any]] = []
    for name in op.inputs:
        value = state.value(name)
        if not isinstance(value, Value) or not (is_state(name) or set(rows) <= set(value.rows)):
            return f"its input {name} was not recorded for all of its tokens"
        arrays.append(value.array if is_state(name) else take_rows(name, value.array, value.rows, rows))
    return tuple(arrays)


def stack_state(passes: Sequence[PassState], source: str) -> Value | None:
    """Concatenate one tap over all passes so far: the KV state. None unless each pass recorded all of its rows."""
    arrays = []
    for state in passes:
        value = state.values.get(source)
        if not isinstance(value, Value) or value.rows != state.all_rows:
            return None
        arrays.append(value.array)
    array = np.concatenate(arrays)
    return Value(array, tuple(range(array.shape[0])))


def take_recorded(state: PassState, recorded: Mapping[str, TapArray], op: Op) -> TapArray | None:
    """Return the recorded output of an op and make it what later operations read."""
    tap = recorded.get(op.output)
    if tap is not None:
        state.values[op.output] = recorded_value(tap, state.n_tokens)
    return tap
