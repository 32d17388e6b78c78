"""A segment put together: which operations lie between recorded tensors, and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crossval.audit.bounds import Arithmetic, Reading
from crossval.audit.bounds.approx import Approx, exact, joined, recorded
from crossval.audit.segments import Cells, Outcome, Part, Segment
from crossval.audit.state import Computed, Covered, PassState, Pending, Value
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, state_source
from crossval.passes import TapArray


def segment(
    op: Op,
    states: Sequence[PassState],
    state: PassState,
    tap: TapArray,
    weights: WeightSource,
    arithmetic: Arithmetic,
    preferred: Mapping[str, Reading],
) -> tuple[Segment, dict[str, Covered]]:
    """Return the operations between recorded tensors and ``op``, with what they read.

    ``states``: of all passes, in order; those before this one hold the KV cache. Also returns, for every tensor of
    the segment, the unrecorded ones it was computed from, itself included.

    Raises:
        ValueError: a tensor is needed and was recorded for other tokens only.
    """
    ops = _closure(op, state)
    made = {one.output for one in ops}
    inputs: dict[str, Part] = {}
    cells: dict[str, Cells] = {}
    covers: dict[str, Covered] = {}
    for one in ops:
        covers[one.output] = frozenset({(state.index, one.output)})
        for name in one.inputs:
            if is_state(name):
                if name not in cells:
                    found = _cells(name, states, state, weights, arithmetic, preferred)
                    cells[name], covers[name] = found
                covers[one.output] |= covers[name]
                name = state_source(name)
            if name not in made and name not in inputs:
                inputs[name], covers[name] = _part(name, state, arithmetic)
            covers[one.output] |= covers[name]
    positions = np.asarray(state.plan.positions, np.int64)
    inputs.setdefault("positions", Part(exact(positions), state.all_rows))
    return Segment(ops, inputs, cells, state.n_tokens, weights, arithmetic, tap, preferred, state.flips), covers


def _part(name: str, state: PassState, arithmetic: Arithmetic) -> tuple[Part, Covered]:
    """Return what a segment reads, and what was computed for it."""
    value = state.value(name)
    if isinstance(value, Computed):
        return value.part, value.covered
    if isinstance(value, Value):
        return Part(recorded(value.array, arithmetic), value.rows), frozenset()
    raise ValueError(f"{name} was not recorded and cannot be computed")


def _closure(op: Op, state: PassState) -> tuple[Op, ...]:
    """Return the operation and the pending ones it depends on within the pass, in execution order."""
    found: dict[str, Op] = {}

    def visit(one: Op) -> None:
        for name in one.inputs:
            value = state.value(state_source(name) if is_state(name) else name)
            if isinstance(value, Pending) and value.op.output not in found:
                visit(value.op)
        found[one.output] = one

    visit(op)
    return tuple(found.values())


def _cells(
    name: str,
    states: Sequence[PassState],
    state: PassState,
    weights: WeightSource,
    arithmetic: Arithmetic,
    preferred: Mapping[str, Reading],
) -> tuple[Cells, Covered]:
    """Return the rows of a KV cache that the passes before this one left, and what was computed for them."""
    source = state_source(name)
    parts: list[Approx] = []
    covered: Covered = frozenset()
    n_open = 0.0
    rows: tuple[int, ...]
    for earlier in states[: state.index]:
        value = earlier.values.get(source)
        if isinstance(value, Pending):  # nothing recorded in that pass depended on it
            value = _resolve(value.op, states, earlier, weights, arithmetic, preferred)
        if isinstance(value, Computed):
            parts.append(value.part.approx)
            rows, covered = value.part.rows, covered | value.covered
            n_open += value.part.open_up_to(earlier.n_tokens, alone=False)
        elif isinstance(value, Value):
            parts.append(recorded(value.array, arithmetic))
            rows = value.rows
        else:
            rows = ()
        if rows != earlier.all_rows:
            raise ValueError(f"{source} of pass {earlier.index} was not recorded for all of its tokens")
    return Cells(joined(*parts) if parts else None, n_open), covered


def _resolve(
    op: Op,
    states: Sequence[PassState],
    state: PassState,
    weights: WeightSource,
    arithmetic: Arithmetic,
    preferred: Mapping[str, Reading],
) -> Computed:
    """Compute a pending tensor without judging anything; its ties stay open."""
    nothing = TapArray(np.zeros(0, np.float32))
    found, covers = segment(op, states, state, nothing, weights, arithmetic, preferred)
    found.compute()
    done = Computed(found.part_of(op.output), covers[op.output])
    state.values[op.output] = done
    return done


def keep(state: PassState, outcome: Outcome, covers: Mapping[str, Covered]) -> None:
    """Make what a segment computed readable for what comes after it."""
    found = outcome.segment
    for op in found.ops[:-1]:
        state.values[op.output] = Computed(outcome.part_of(op.output), covers[op.output])
