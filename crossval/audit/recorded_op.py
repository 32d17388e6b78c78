"""One operation of one pass as an engine recorded it, with everything of the model and the trace around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import Rounding, read_as
from crossval.audit.state import recorded_value
from crossval.errors import BadInputError
from crossval.model.config import SpecConfig
from crossval.model.graphs import before_layers
from crossval.model.kinds import IntArray, visible_keys, widen
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, state_source, take_rows, visible
from crossval.passes import PassPlan, PassRecord, TapArray

Array = npt.NDArray[Any]
Self = TypeVar("Self", bound="RecordedOp")


class Inapplicable(Exception):
    """Something does not exist for this operation: a shape does not fit, or an array was not recorded."""


@dataclass(frozen=True)
class RecordedOp:
    """One operation of one pass. ``raw`` and ``recorded`` cover the tokens ``rows`` of the pass."""

    op: Op
    config: SpecConfig
    weights: WeightSource
    """Every tensor of the model by its GGUF name."""
    plan: PassPlan
    rows: tuple[int, ...]
    """Token indices within the pass that the output covers."""
    raw: tuple[Array, ...]
    """What the op reads, in the order of ``op.inputs``, as the engine recorded it."""
    recorded: Array
    """The recorded output, shaped as ``crossval.model.taps`` says."""
    values: Mapping[str, TapArray] = field(default_factory=dict)
    """All that was recorded in this pass, by full tap name."""
    previous: Sequence[Mapping[str, TapArray]] = ()
    """The same of the passes before, oldest first."""
    rounded: tuple[Rounding | None, ...] = ()
    """Which inputs this engine rounds to a 16-bit format before it uses them; of no operation: none."""
    passes: Sequence[PassRecord] = ()
    """All recorded passes, this one and later ones too."""

    @classmethod
    def of_records(
        cls: type[Self],
        op: Op,
        records: Sequence[PassRecord],
        config: SpecConfig,
        weights: WeightSource,
        *,
        index: int = -1,
    ) -> Self:
        """Return one op in pass ``index`` of a trace; ``records`` must hold the op's inputs and output.

        Raises:
            BadInputError: an input or the output was not recorded.
        """
        index %= len(records)
        record, previous = records[index], [earlier.taps for earlier in records[:index]]
        output = record.taps.get(op.output)
        if output is None:
            raise BadInputError(f"{op.output} of pass {index} was not recorded; record it to have it diagnosed")
        rows = recorded_value(output, len(record.plan.token_ids)).rows
        made = cls(op, config, weights, record.plan, rows, (), output.array, record.taps, previous)
        try:
            return replace(made, raw=tuple(map(made.input, op.inputs)), passes=tuple(records))
        except Inapplicable:
            inputs = ", ".join(op.inputs)
            raise BadInputError(
                f"pass {index} lacks an input of {op.output} ({inputs}); record it to have it diagnosed"
            ) from None

    # --- the pass ---------------------------------------------------------------------------------------------

    @property
    def layer(self) -> int | None:
        """Index of the layer; None for the embedding and the head."""
        return self.op.layer

    @property
    def start(self) -> int:
        """Position of the pass's first token."""
        return self.plan.start

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return len(self.plan.token_ids)

    @property
    def n_rows(self) -> int:
        """Tokens that the output covers."""
        return len(self.rows)

    @property
    def whole_pass(self) -> bool:
        """Whether the output covers every token of the pass."""
        return self.n_rows == self.n_tokens

    @property
    def positions(self) -> IntArray:
        """Positions of the covered tokens, ``(n_rows,)``."""
        return np.asarray(self.rows, np.int64) + self.start

    @cached_property
    def token_axis(self) -> int:
        """Axis of the output that counts tokens."""
        return self.op.token_axis

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """Which elements count: scores of later tokens are masked afterwards. None: all."""
        return visible(self.op.output, self.recorded.shape, self.positions)

    def masked(self, output: Array) -> Array:
        """Return scores with those of later tokens zeroed; the output of any other operation as it is."""
        return output if self.visible is None else np.where(self.visible, output, 0.0)

    def mask(self, n_kv: int, offset: int = 0) -> npt.NDArray[np.bool_]:
        """Return which cells each token sees, ``(n_rows, n_kv)``; ``offset`` 1 lets it see one of the future."""
        return visible_keys(n_kv, self.positions + offset)

    # --- inputs and output ------------------------------------------------------------------------------------

    @cached_property
    def inputs(self) -> tuple[Array, ...]:
        """What the op reads, in float64, after the 16-bit roundings of this engine."""
        return tuple(self.round(i, array) for i, array in enumerate(self.raw))

    def round(self, index: int, array: Array) -> Array:
        """Treat an array as this engine treats the op's input of that index."""
        return read_as(self.rounded[index] if self.rounded else None, array)

    def compute(self, *inputs: Array) -> Array:
        """Return what the operation makes of other inputs, shaped as the tap."""
        return self.op.function(*inputs, *(self.weights[name] for name in self.op.weights))

    @cached_property
    def expected(self) -> Array:
        """What the specification computes."""
        return self.compute(*self.inputs)

    # --- the neighbourhood ------------------------------------------------------------------------------------

    @property
    def layer_input(self) -> str:
        """Full name of the tap this layer starts from."""
        if self.layer is None:
            raise Inapplicable
        if self.layer:
            return f"blk.{self.layer - 1}.l_out"
        return before_layers(self.config)[-1].output

    def name(self, tap: str) -> str:
        """Return the full name of a tap or tensor of this layer."""
        if self.layer is None:
            raise Inapplicable
        return f"blk.{self.layer}.{tap}"

    def input(self, name: str) -> Array:
        """Return what an op reads under a name: a tap, ``positions``, ``token_ids`` or KV state.

        Raises:
            Inapplicable: it was not recorded for these rows.
        """
        if name == "positions":
            return self.positions
        if name == "token_ids":
            return np.asarray(self.plan.token_ids, np.int64)[list(self.rows)]
        return self.cells(state_source(name)) if is_state(name) else self.tap(name)

    def tap(self, name: str, rows: Sequence[int] | None = None) -> Array:
        """Return another recorded array (full name), float64, cut to the rows of the output or to ``rows``.

        Raises:
            Inapplicable: it was not recorded for these rows.
        """
        found = self.values.get(name)
        if found is None:
            raise Inapplicable
        value = recorded_value(found, self.n_tokens)
        rows = self.rows if rows is None else rows
        if not set(rows) <= set(value.rows):
            raise Inapplicable
        return widen(take_rows(name, value.array, value.rows, rows))

    def cells(self, name: str) -> Array:
        """Return all rows of a tap (full name) in the passes so far: ``(n_kv, n_kv_heads, head_dim)``."""
        return np.concatenate([widen(part.array) for part in self._so_far(name)])

    def lengths(self, name: str) -> list[int]:
        """Return how many tokens the passes so far had, this one last, by a tap (full name)."""
        return [part.array.shape[0] for part in self._so_far(name)]

    def _so_far(self, name: str) -> list[TapArray]:
        parts = [taken.get(name) for taken in (*self.previous, self.values)]
        whole = [part for part in parts if part is not None and part.rows is None]
        if len(whole) < len(parts):
            raise Inapplicable
        return whole
