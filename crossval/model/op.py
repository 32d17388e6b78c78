"""An operation of a model's graph, with everything that the harness knows about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from crossval.model.kinds import FloatArray, Kind, Weight, widen

Axis = Literal["n_tokens", "n_kv", "n_heads", "n_kv_heads", "head_dim", "q_dim", "dim", "hidden_dim", "vocab_size"]
"""An axis of a tensor by its length; ``q_dim`` is ``n_heads * head_dim``, ``n_kv`` the tokens so far."""


class WeightSource(Protocol):
    """Weights by GGUF tensor name; a dict will do, a file may decode on demand."""

    def __getitem__(self, name: str, /) -> Weight: ...


@dataclass(frozen=True)
class Op:
    """One row of a graph: ``output = kind(*inputs, *weights)``."""

    name: str
    """The tap's name without its layer, the same in every layer."""
    layer: int | None
    """None for an operation before or after the layers."""
    kind: Kind
    """Formula and hyper-parameters."""
    inputs: tuple[str, ...]
    """What it reads: full tap names, ``token_ids``, ``positions``, or KV state (see ``appends_to``)."""
    weights: tuple[str, ...]
    """GGUF tensor names of its weights."""
    axes: tuple[Axis, ...]
    """Shape of the output."""
    appends_to: str | None = None
    """KV state that grows by this output: all rows of this tap in all passes so far, oldest first."""
    optional: bool = False
    """Models of this architecture may lack it."""
    output_rows: bool = False
    """Engines may give it only for the tokens of a pass whose logits are wanted."""
    last_row_only: bool = False
    """In the forward pass, computed for the last token only: nothing after it needs the others."""

    @property
    def output(self) -> str:
        """Full name of the tap it computes."""
        return self.name if self.layer is None else f"blk.{self.layer}.{self.name}"

    @property
    def kind_name(self) -> str:
        """Name of its kind, as people write it: ``bitlinear``, ``rmsnorm``."""
        return type(self.kind).__name__.lower()

    @property
    def token_axis(self) -> int:
        """Axis of the output that counts tokens."""
        return self.axes.index("n_tokens")

    def shape(self, model: Any, n_tokens: int, n_kv: int) -> tuple[int, ...]:
        """Return the shape of the output for some tokens of a pass.

        ``model`` has the other axes as attributes (``SpecConfig``, ``TraceModel``); ``n_kv``: tokens so far.
        """
        lengths = {"n_tokens": n_tokens, "n_kv": n_kv, "q_dim": model.n_heads * model.head_dim}
        return tuple(lengths[axis] if axis in lengths else getattr(model, axis) for axis in self.axes)

    def n_features(self, model: Any) -> int:
        """Return the values of one token (of scores: and one key)."""
        return math.prod(self.shape(model, 1, 1))

    def function(self, *arrays: Any) -> FloatArray:
        """Compute the output in float64 from arrays of the inputs, then the weights."""
        return self.kind.compute(*arrays)

    def apply(self, values: Mapping[str, npt.NDArray[Any]], weights: WeightSource) -> FloatArray:
        """Compute the output in float64 from ``values`` (by input name) and ``weights`` (by tensor name)."""
        return self.function(*(widen(values[n]) for n in self.inputs), *(weights[n] for n in self.weights))


@dataclass
class KVState:
    """What a sequence keeps for its next pass: rotated keys and values of every layer, float64."""

    n_tokens: int = 0
    arrays: dict[str, FloatArray] = field(default_factory=dict)


def forward(
    table: Sequence[Op], weights: WeightSource, token_ids: Sequence[int], state: KVState
) -> Iterator[tuple[Op, FloatArray]]:
    """Execute a graph on the next tokens of a sequence; yield each op with its output, in order.

    Values are dropped after their last use, so memory is bounded by one layer whatever the model. ``state``
    changes only once the pass is complete.
    """
    last_use = {name: i for i, op in enumerate(table) for name in op.inputs}
    values: dict[str, npt.NDArray[Any]] = {
        "token_ids": np.asarray(token_ids, dtype=np.int64),
        "positions": np.arange(state.n_tokens, state.n_tokens + len(token_ids), dtype=np.int64),
    }
    grown: dict[str, FloatArray] = {}
    for i, op in enumerate(table):
        if op.last_row_only:
            values.update({name: values[name][-1:] for name in op.inputs})
        output = op.apply(values, weights)
        values[op.output] = output
        if op.appends_to is not None:
            past = state.arrays.get(op.appends_to)
            grown[op.appends_to] = output if past is None else np.concatenate([past, output])
            values[op.appends_to] = grown[op.appends_to]
        yield op, output
        for name in (*op.inputs, op.output):
            if last_use.get(name, i) <= i:
                values.pop(name, None)
    state.arrays.update(grown)
    state.n_tokens += len(token_ids)
