"""What is known of the passes of one engine under audit: recorded tensors, and those still to be computed.

A tensor that an engine did not record is *pending*: the next recorded one that depends on it is judged as the
output of a segment of several operations (``segments``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.approx import Approx
from crossval.capture import Place
from crossval.formats import F32, Format
from crossval.model.kinds import FloatArray
from crossval.model.op import Op
from crossval.model.taps import is_state, take_rows, visible
from crossval.passes import PassPlan, TapArray

Covered = frozenset[Place]
"""Operations, by their output, whose results were computed here and not recorded."""


@dataclass(frozen=True)
class Part:
    """A result of an operation, or what one reads, for some rows of the pass."""

    approx: Approx
    rows: tuple[int, ...]
    n_open: FloatArray | None = None
    """Per row, ties among what it was computed from that nothing has decided; None: it was recorded."""

    def open_up_to(self, row: int, *, alone: bool) -> float:
        """Return the undecided ties of a row, or of all rows up to it."""
        if self.n_open is None:
            return 0.0
        rows = np.asarray(self.rows)
        return float(self.n_open[(rows == row) if alone else (rows <= row)].sum())


@dataclass(frozen=True)
class Value:
    """An array an operation reads, as the engine recorded it."""

    array: npt.NDArray[Any]
    rows: tuple[int, ...]
    """Token indices within the pass; for KV state, cells."""
    form: Format = F32
    """What it was stored in, where the engine had more digits."""


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

    @cached_property
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


@dataclass(frozen=True)
class Output:
    """One recorded output: what a check is about."""

    op: Op
    state: PassState
    """Of the pass."""
    tap: TapArray
    form: Format = F32
    """What it was stored in, where the engine had more digits."""

    @property
    def array(self) -> npt.NDArray[np.float32]:
        """The recorded values."""
        return self.tap.array

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Token indices within the pass that were recorded."""
        return self.state.all_rows if self.tap.rows is None else self.tap.rows

    @property
    def place(self) -> Place:
        """Index of the pass and full name of the tap."""
        return self.state.index, self.op.output

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """Which elements count; None: all."""
        return visible(self.op.output, self.array.shape, [self.state.plan.positions[row] for row in self.rows])

    def inputs(self) -> list[npt.NDArray[Any]]:
        """Return what the operation read, cut to the recorded rows.

        Raises:
            ValueError: an input was not recorded for these rows.
        """
        arrays: list[npt.NDArray[Any]] = []
        for name in self.op.inputs:
            value = self.state.value(name)
            if not isinstance(value, Value) or not (is_state(name) or set(self.rows) <= set(value.rows)):
                raise ValueError(f"its input {name} was not recorded for all of its tokens")
            arrays.append(value.array if is_state(name) else take_rows(name, value.array, value.rows, self.rows))
        return arrays

    def form_of_inputs(self) -> Format:
        """Return the format with the fewest digits that an input was stored in, where the engine had more."""
        values = (self.state.value(name) for name in self.op.inputs)
        forms = [value.form for value in values if isinstance(value, Value)]
        return max(forms, key=lambda form: form.unit_roundoff, default=F32)


def recorded_value(tap: TapArray, n_tokens: int) -> Value:
    """Wrap a recorded tap of a pass of ``n_tokens``."""
    return Value(tap.array, tuple(range(n_tokens)) if tap.rows is None else tap.rows)


def stack_state(passes: Sequence[PassState], source: str) -> Value | None:
    """Concatenate one tap over all passes so far: the KV state. None unless each pass recorded all of its rows."""
    arrays, form = [], F32
    for state in passes:
        value = state.values.get(source)
        if not isinstance(value, Value) or value.rows != state.all_rows:
            return None
        arrays.append(value.array)
        form = max(form, value.form, key=lambda form: form.unit_roundoff)
    array = np.concatenate(arrays)
    return Value(array, tuple(range(array.shape[0])), form)
