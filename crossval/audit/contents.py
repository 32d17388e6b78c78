"""What an incorrectly recorded array really contains: another tensor, or its own, scaled or in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.recorded_op import Inapplicable, RecordedOp
from crossval.capture import Place, Source
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.kinds import ACTIVATIONS, Add, Head, Kind, RmsNorm, Rope, Softmax, widen
from crossval.model.op import Op
from crossval.model.taps import token_axis
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord, TapArray

NEAR = 1e-3
"""Relative L2 of half of the tokens at least: what rounding to binary16 before the operation leaves."""
FLIPPED = 0.02
"""Of every token: what int8 values at rounding ties leave."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Contents:
    """What an array really contains, as far as can be told, and what to change."""

    what: str
    remedy: str
    exact: bool = False
    """It holds another recorded array to the last bit."""


_IN_PLACE: dict[type[Kind], str] = {
    Rope: "copy the tensor before RoPE rotates it in place",
    Softmax: "copy the scores before softmax is taken in place",
    **{type(kind): "copy the tensor before the activation is applied in place" for kind in ACTIVATIONS.values()},
}
"""What to do about a tensor that holds the result of the operation that reads it, by the kind of that one."""
_NORMED = "record the sum before the final norm: the last hidden state that is handed out is normed already"
_COPY = "copy the tensor as soon as it has been computed"


def find(source: Source, place: Place, weights: SpecWeights) -> Contents:
    """Say what is in an array that was recorded incorrectly.

    Raises:
        UnavailableError, EngineCrashError: from the runner.
    """
    index, tap = place
    ops = op_table(weights.config)
    records = _around(source, place, ops, weights.config.n_layers)
    taken = records[index].taps[tap]
    n_bad = int(np.count_nonzero(~np.isfinite(taken.array)))
    if n_bad and not taps.op_of(tap).kind.unmasked:
        return Contents(f"{n_bad} of {taken.array.size} values are not finite, and nothing read them", _COPY)
    found = _of_same_bits(records, place) or _of_another_pass(records, place)
    if found is not None:
        return found
    (op,) = (op for op in ops if op.output == tap)
    return _near(op, records, index, weights) or Contents("it holds none of the tensors around it", _COPY)


def _around(source: Source, place: Place, ops: Sequence[Op], n_layers: int) -> list[PassRecord]:
    """Return what lies around the array in the passes up to its own, and the array alone in those after it."""
    index, tap = place
    layer = taps.parse(tap).layer
    near = (None, n_layers - 1) if layer is None else (None, layer, layer + 1)
    names = [
        op.output
        for op in ops
        if op.output == tap or isinstance(op.kind, Add) or (op.layer in near and not isinstance(op.kind, Head))
    ]
    return [*source.records(names, index + 1), *source.records([tap])[index + 1 :]]


# --- another recorded array -----------------------------------------------------------------------------------


def _of_same_bits(records: Sequence[PassRecord], place: Place) -> Contents | None:
    """Return the tensor of the same pass whose bits it holds: the nearest later one, else the nearest earlier."""
    index, tap = place
    taken = records[index].taps[tap]
    same = [
        name
        for name, other in records[index].taps.items()
        if name != tap and _same(taken, other, token_axis(tap) == 0)
    ]
    if not same:
        return None
    # several hold one buffer's last contents when every copy was taken at the end: the last one is what it is
    name = max(same, key=taps.execution_index)
    if taps.execution_index(name) > taps.execution_index(tap):
        remedy = _remedy(tap, name)
    else:
        remedy = f"record it under its own name, after its operation has run: {name} comes before it"
    return Contents(f"in pass {index} it holds {name} to the last bit", remedy, exact=True)


def _remedy(tap: str, held: str) -> str:
    """Return what to do about a tensor that holds a later one."""
    reader = taps.op_of(held)
    final_norm = isinstance(reader.kind, RmsNorm) and reader.layer is None
    remedy = _NORMED if final_norm else _IN_PLACE.get(type(reader.kind))
    if remedy is not None and taps.parse(reader.inputs[0]).tap == taps.parse(tap).tap:
        return remedy
    return f"{_COPY}: its buffer is used again for {held}"


def _same(a: TapArray, b: TapArray, by_row: bool) -> bool:
    if a.array.size != b.array.size or (by_row and a.rows != b.rows):
        return False
    return bool(a.array.any()) and a.array.tobytes() == b.array.tobytes()


def _of_another_pass(records: Sequence[PassRecord], place: Place) -> Contents | None:
    index, tap = place
    taken = records[index].taps[tap]
    for other, record in enumerate(records):
        found = record.taps.get(tap)
        if other != index and found is not None and _same(replace(found, rows=taken.rows), taken, by_row=True):
            what = f"in pass {index} it holds its own values of pass {other} to the last bit"
            return Contents(what, "copy the tensor in every pass: its buffer is used again", exact=True)
    return None


# --- computed from what is recorded ---------------------------------------------------------------------------


def _near(op: Op, records: Sequence[PassRecord], index: int, weights: SpecWeights) -> Contents | None:
    """Compare with what the specification computes from the tensor's inputs, and with that permuted or scaled."""
    try:
        context = RecordedOp.of_records(op, records, weights.config, weights, index=index)
    except BadInputError:
        return None
    expected = context.expected.reshape(context.recorded.shape)
    recorded = widen(context.recorded)
    axis = token_axis(op.output)
    for name, made in _permuted(op, expected, weights.config.n_heads):
        if _fits(recorded, made, axis):
            return Contents(
                f"in pass {index} it holds its own values with the axes in the order {name}",
                "write the array in the order of docs/trace-format.md, the last axis running fastest",
            )
    factor = _factor(context, recorded, expected)
    if factor is not None:
        return Contents(
            f"in pass {index} it holds {factor:.4g} times its values",
            "record the tensor as docs/trace-format.md defines it, before it is scaled or after",
        )
    for reader in op_table(weights.config):
        if reader.inputs and reader.inputs[0] == op.output and reader.output not in records[index].taps:
            try:
                others = [context.input(name) for name in reader.inputs[1:]]
                loaded = [weights[name] for name in reader.weights]
                made = reader.function(expected, *others, *loaded)
            except (Inapplicable, ValueError):
                continue
            if made.size == recorded.size and _fits(recorded, made.reshape(recorded.shape), axis):
                what = f"in pass {index} it holds what {reader.output} has to be"
                return Contents(what, _remedy(op.output, reader.output))
    return None


def _factor(context: RecordedOp, recorded: Array, expected: Array) -> float | None:
    """Return by how much all values are multiplied; of scores, those that the mask shows."""
    recorded, expected = context.masked(recorded), context.masked(expected)
    square = float(np.sum(expected * expected))
    factor = float(np.sum(recorded * expected)) / square if square else 0.0
    return factor if factor and _fits(recorded, factor * expected, context.token_axis) else None


def _permuted(op: Op, expected: Array, n_heads: int) -> Iterator[tuple[str, Array]]:
    """Yield the array as it comes out when its axes are written in another order."""
    shape = expected.shape
    views: list[tuple[Array, tuple[str, ...]]]
    if len(shape) == 3:
        views = [(expected, taps.axis_names(op.output))]
    else:
        views = [(expected, ("token", "feature"))]
        if "q_dim" in op.axes:
            views.append((expected.reshape(shape[0], n_heads, -1), ("token", "head", "feature")))
    for view, names in views:
        for order in permutations(range(view.ndim)):
            if order != tuple(range(view.ndim)):
                made = view.transpose(order).reshape(shape)
                if not np.array_equal(made, expected):
                    yield ", ".join(names[i] for i in order), made


def _fits(recorded: Array, made: Array, axis: int) -> bool:
    others = tuple(i for i in range(recorded.ndim) if i != axis)
    off = np.sqrt(np.sum((recorded - made) ** 2, axis=others))
    size = np.sqrt(np.sum(made * made, axis=others))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(off == 0, 0.0, off / size)
    return bool(np.median(distance) <= NEAR and np.max(distance) <= FLIPPED)
