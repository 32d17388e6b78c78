"""A segment put together: which operations lie between recorded tensors, and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crossval.audit.bounds import Arithmetic
from crossval.audit.bounds.approx import Approx, joined, recorded
from crossval.audit.segments import Cells, Outcome, Readings, Segment
from crossval.audit.state import Computed, Covered, Output, Part, PassState, Pending, Value
from crossval.formats import F32
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, state_source
from crossval.passes import TapArray


@dataclass(frozen=True)
class Assembly:
    """What the segments of one engine are made of."""

    states: Sequence[PassState]
    """Of all passes, in order; those before a segment's hold the KV cache."""
    weights: WeightSource
    arithmetic: Arithmetic
    preferred: Readings

    def segment(self, output: Output) -> tuple[Segment, dict[str, Covered]]:
        """Return the operations between recorded tensors and an output, with what they read.

        Also returns, for every tensor of the segment, the unrecorded ones it was computed from, itself included.

        Raises:
            ValueError: a tensor is needed and was recorded for other tokens only.
        """
        state = output.state
        ops = _closure(output.op, state)
        made = {one.output for one in ops}
        inputs: dict[str, Part] = {}
        cells: dict[str, Cells] = {}
        covers: dict[str, Covered] = {}
        for one in ops:
            covers[one.output] = frozenset({(state.index, one.output)})
            for name in one.inputs:
                of_cache = is_state(name)
                if of_cache:
                    if name not in cells:
                        cells[name], covers[name] = self._cells(state_source(name), state)
                    covers[one.output] |= covers[name]
                    name = state_source(name)
                if name not in made and name not in inputs:
                    inputs[name], covers[name] = self._part(name, state)
                if of_cache and name not in made:
                    _check_whole(inputs[name], name, state)
                covers[one.output] |= covers[name]
        found = Segment(output, ops, inputs, cells, self.weights, self.arithmetic, self.preferred)
        return found, covers

    def _part(self, name: str, state: PassState) -> tuple[Part, Covered]:
        """Return what a segment reads, and what was computed for it."""
        value = state.value(name)
        if isinstance(value, Computed):
            return value.part, value.covered
        if isinstance(value, Value):
            return Part(recorded(value.array, self.arithmetic.storing(value.form, F32)), value.rows), frozenset()
        raise ValueError(f"{name} was not recorded and cannot be computed")

    def _cells(self, source: str, state: PassState) -> tuple[Cells, Covered]:
        """Return the rows of a KV cache that earlier passes left, and what was computed for them."""
        parts: list[Approx] = []
        covered: Covered = frozenset()
        n_open = 0.0
        for earlier in self.states[: state.index]:
            value = earlier.value(source)
            if isinstance(value, Pending):  # nothing recorded in that pass depended on it
                self._resolve(value.op, earlier)
            part, computed = self._part(source, earlier)
            _check_whole(part, source, earlier)
            parts.append(part.approx)
            covered |= computed
            n_open += part.open_up_to(earlier.n_tokens, alone=False)
        return Cells(joined(*parts) if parts else None, n_open), covered

    def _resolve(self, op: Op, state: PassState) -> None:
        """Compute a pending tensor without judging anything; its ties stay open."""
        nothing = TapArray(np.zeros(0, np.float32))
        found, covers = self.segment(Output(op, state, nothing))
        found.compute()
        state.values[op.output] = Computed(found.part_of(op.output), covers[op.output])


def _check_whole(part: Part, name: str, state: PassState) -> None:
    """Check that a tensor of the KV cache is there for all tokens of a pass: later ones attend to them.

    Raises:
        ValueError: it is not.
    """
    if part.rows != state.all_rows:
        raise ValueError(f"{name} of pass {state.index} was not recorded for all of its tokens")


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


def keep(state: PassState, outcome: Outcome, covers: Mapping[str, Covered]) -> None:
    """Make what a segment computed readable for what comes after it."""
    for op in outcome.segment.ops[:-1]:
        state.values[op.output] = Computed(outcome.part_of(op.output), covers[op.output])
