"""What a variant computes from: one recorded operation, and everything of the model and the trace around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import read_as
from crossval.errors import BadInputError
from crossval.formats import Dtype
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.kinds import BitLinear, Head, IntArray, TernaryMatrix, widen
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, parse, state_source, take_rows, token_axis, visible
from crossval.passes import PassPlan, PassRecord, TapArray

Array = npt.NDArray[Any]
Quantizer = Literal["float64", "float32", "fused", "divide"]
"""How an engine gets from a float activation to its code (see ``linear.scaled``)."""

CHUNK_FEATURES = 512
"""Output features of a matrix multiplied at a time; bounds memory."""


class Inapplicable(Exception):
    """A variant does not exist for this operation: a shape does not fit, or an array was not recorded."""


@dataclass
class Held:
    """Decoded matrices kept during one diagnosis: decoding costs more than multiplying a sample."""

    own: TernaryMatrix | None = None
    scales: dict[str, float] = field(default_factory=dict)
    cut: dict[tuple[str, bytes], TernaryMatrix] = field(default_factory=dict)
    """Rows looked at, by name and which."""


@dataclass(frozen=True)
class Context:
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
    """The guilty output, shaped as ``crossval.model.taps`` says."""
    values: Mapping[str, TapArray] = field(default_factory=dict)
    """All that was recorded in this pass, by full tap name."""
    previous: Sequence[Mapping[str, TapArray]] = ()
    """The same of the passes before, oldest first."""
    rounded: tuple[Dtype | None, ...] = ()
    """Which inputs this engine rounds to a 16-bit format before it uses them; of no operation: none."""
    quantizer: Quantizer = "float64"
    features: IntArray | None = None
    """Output features looked at (matrix products only); None: all."""
    held: Held = field(default_factory=Held)
    passes: Sequence[PassRecord] = ()
    """All recorded passes, this one and later ones too."""
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    # --- the pass ---------------------------------------------------------------------------------------------

    @property
    def layer(self) -> int | None:
        """Index of the layer; None for the embedding and the head."""
        return taps.parse(self.op.output).layer

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
    def positions(self) -> IntArray:
        """Positions of the covered tokens, ``(n_rows,)``."""
        return np.asarray(self.rows, np.int64) + self.start

    @cached_property
    def token_axis(self) -> int:
        """Axis of ``target`` that counts tokens."""
        return token_axis(self.op.output)

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """Which elements count: scores of later tokens are masked afterwards. None: all."""
        return visible(self.op.output, self.target.shape, self.positions)

    # --- inputs and outputs -----------------------------------------------------------------------------------

    @property
    def is_linear(self) -> bool:
        """Whether the op multiplies by a ternary matrix."""
        return isinstance(self.op.kind, BitLinear)

    @property
    def is_flat(self) -> bool:
        """Whether outputs are ``(n_rows, features)`` cut to ``features``: every product with a weight matrix."""
        return isinstance(self.op.kind, BitLinear | Head)

    def flat(self, output: Array) -> Array:
        """Bring a whole output, shaped as the tap, into the shape of ``target``."""
        if not self.is_flat:
            return output
        flat = output.reshape(output.shape[0], -1)
        return flat if self.features is None else flat[:, self.features]

    @cached_property
    def target(self) -> Array:
        """The recorded output in float64; of matrix products ``(n_rows, features looked at)``."""
        return self.flat(widen(self.recorded))

    def by_token(self, output: Array) -> Array:
        """Return ``(n_rows, values)`` of an output shaped as ``target``; scores of later tokens are zeroed."""
        if self.visible is not None:
            output = np.where(self.visible, output, 0.0)
        if self.token_axis:
            output = np.moveaxis(output, self.token_axis, 0)
        return output.reshape(output.shape[0], -1)

    @cached_property
    def target_by_token(self) -> Array:
        """The recorded output, ``(n_rows, values)``."""
        return self.by_token(self.target)

    @cached_property
    def expected(self) -> Array:
        """What the specification computes, shaped as ``target``."""
        if self.is_flat:
            from crossval.diagnose.variants.linear import head, linear  # these build on this module

            return linear(self) if self.is_linear else head(self)
        own = [self.weights[name] for name in self.op.weights]
        return self.op.function(*self.inputs, *own)

    @cached_property
    def quantized(self) -> tuple[Array, Array]:
        """A BitLinear's input as integer codes (float32), and the scale of each token."""
        from crossval.diagnose.variants.linear import input_scale, quantize  # they build on this module

        scale = input_scale(self, self.inputs[0])
        return quantize(self, self.inputs[0], scale), scale

    @cached_property
    def inputs(self) -> tuple[Array, ...]:
        """What the op reads, in float64, after the binary16 roundings of this engine."""
        return tuple(self.round(i, array) for i, array in enumerate(self.raw))

    def round(self, index: int, array: Array) -> Array:
        """Treat an array as this engine treats the op's input of that index."""
        return read_as(self.rounded[index] if self.rounded else None, array)

    def feature_chunks(self, n_features: int) -> Iterator[IntArray]:
        """Yield the output features to compute, some at a time."""
        wanted = np.arange(n_features) if self.features is None else self.features
        for first in range(0, wanted.size, CHUNK_FEATURES):
            yield wanted[first : first + CHUNK_FEATURES]

    # --- the neighbourhood ------------------------------------------------------------------------------------

    @property
    def layer_input(self) -> str:
        """Full name of the tap this layer starts from."""
        if self.layer is None:
            raise Inapplicable
        return "inp_embd" if self.layer == 0 else f"blk.{self.layer - 1}.l_out"

    def name(self, tap: str) -> str:
        """Return the full name of a tap or tensor of this layer."""
        if self.layer is None:
            raise Inapplicable
        return f"blk.{self.layer}.{tap}"

    def tap(self, name: str) -> Array:
        """Return another recorded array (full name), float64, cut to the rows of the output.

        Raises:
            Inapplicable: it was not recorded for these rows.
        """
        found = self.values.get(name)
        if found is None:
            raise Inapplicable
        return widen(_cut(name, found, self.rows, self.n_tokens))

    def whole(self, name: str) -> Array:
        """Return another recorded array (full name), float64, all tokens of the pass."""
        found = self.values.get(name)
        if found is None:
            raise Inapplicable
        return widen(_cut(name, found, tuple(range(self.n_tokens)), self.n_tokens))

    def cells(self, tap: str) -> Array:
        """Return all rows of a tap of this layer in the passes so far: ``(n_kv, n_kv_heads, head_dim)``."""
        name = self.name(tap)
        parts = [taken.get(name) for taken in (*self.previous, self.values)]
        arrays = [widen(part.array) for part in parts if part is not None and part.rows is None]
        if len(arrays) != len(parts):
            raise Inapplicable
        return np.concatenate(arrays)

    def lengths(self, tap: str) -> list[int]:
        """Return how many tokens the passes so far had, this one last, by a tap of this layer."""
        name = self.name(tap)
        parts = [taken.get(name) for taken in (*self.previous, self.values)]
        found = [part.array.shape[0] for part in parts if part is not None and part.rows is None]
        if len(found) != len(parts):
            raise Inapplicable
        return found

    @property
    def whole_pass(self) -> bool:
        """Whether the output covers every token of the pass."""
        return self.n_rows == self.n_tokens

    @property
    def vector(self) -> Array:
        """The op's own norm weight or table."""
        weight = self.weights[self.op.weights[0]]
        assert not isinstance(weight, TernaryMatrix)
        return weight

    @property
    def matrix(self) -> TernaryMatrix:
        """The op's own ternary matrix."""
        if self.held.own is None:
            self.held.own = self._decoded(self.op.weights[0])
        return self.held.own

    def other(self, name: str) -> TernaryMatrix:
        """Return the rows looked at of another ternary matrix, and its scale."""
        if self.features is None:
            return self._decoded(name)
        key = (name, self.features.tobytes())
        if key not in self.held.cut:
            matrix = self._decoded(name)
            self.held.cut[key] = TernaryMatrix(matrix.signs[self.features], matrix.scale)
        return self.held.cut[key]

    def scale_of(self, name: str) -> float:
        """Return the scale of another ternary matrix."""
        if name not in self.held.scales:
            self._decoded(name)
        return self.held.scales[name]

    def _decoded(self, name: str) -> TernaryMatrix:
        weight = self.weights[name]
        assert isinstance(weight, TernaryMatrix)
        self.held.scales[name] = weight.scale
        return weight

    def once(self, key: str, compute: Callable[[Context], Any]) -> Any:
        """Return what ``compute`` returned the first time it was asked for under this key."""
        if key not in self._known:
            self._known[key] = compute(self)
        return self._known[key]

    # --- changes ----------------------------------------------------------------------------------------------

    def sampled(self, features: IntArray | None) -> Context:
        """Return the same operation seen at some of its output features."""
        return replace(self, features=features)

    def of_tokens(self, kept: Array) -> Context:
        """Return the same matrix product for some of its tokens (flags, or indices into ``rows``)."""
        at = np.arange(self.n_rows)[kept]
        rows = tuple(self.rows[i] for i in at)
        return replace(self, rows=rows, raw=(self.raw[0][at], *self.raw[1:]), recorded=self.recorded[at])


def of_records(
    op: Op, records: Sequence[PassRecord], config: SpecConfig, weights: WeightSource, *, index: int = -1
) -> Context:
    """Build the context of one op in pass ``index`` of a trace; ``records`` must hold the op's inputs and output.

    Raises:
        BadInputError: an input or the output was not recorded.
    """
    index %= len(records)
    record, previous = records[index], [earlier.taps for earlier in records[:index]]
    n_tokens = len(record.plan.token_ids)
    output = record.taps.get(op.output)
    if output is None:
        raise BadInputError(f"{op.output} of pass {index} was not recorded; record it to have it diagnosed")
    rows = tuple(range(n_tokens)) if output.rows is None else output.rows
    context = Context(op, config, weights, record.plan, rows, (), output.array, record.taps, previous)
    try:
        raw = tuple(_input(context, name) for name in op.inputs)
    except Inapplicable:
        raise BadInputError(
            f"pass {index} lacks an input of {op.output} ({', '.join(op.inputs)}); record it to have it diagnosed"
        ) from None
    return replace(context, raw=raw, passes=tuple(records))


def _input(context: Context, name: str) -> Array:
    if name == "positions":
        return context.positions
    if name == "token_ids":
        return np.asarray(context.plan.token_ids, np.int64)[list(context.rows)]
    if is_state(name):
        return context.cells(parse(state_source(name)).tap)
    return context.tap(name)


def _cut(name: str, tap: TapArray, rows: tuple[int, ...], n_tokens: int) -> Array:
    have = tuple(range(n_tokens)) if tap.rows is None else tap.rows
    if not set(rows) <= set(have):
        raise Inapplicable
    return take_rows(name, tap.array, have, rows)
