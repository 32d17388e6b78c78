"""Replay a segment: the operations between recorded tensors, computed again with a mistake in some of them.

A tensor that an engine did not record is computed from those that it did. A replay follows the operations from
there to the next recorded tensor, in every pass whose keys and values it reads, and makes the mistake where a
hypothesis places it; only what a mistake changes is computed again.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds import Arithmetic, Rounding, readings
from crossval.diagnose.variants import Candidate, Context, Inapplicable
from crossval.diagnose.variants.context import Array, Held, Quantizer
from crossval.diagnose.variants.distance import TIE_REACH, near_ties, per_token
from crossval.model.config import SpecConfig
from crossval.model.kinds import Attend, BitLinear, FloatArray, Weight, widen
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, state_source, take_rows, token_axis
from crossval.passes import PassKind, PassRecord, TapArray

BoolArray = npt.NDArray[np.bool_]
Values = Mapping[str, TapArray]


@dataclass(frozen=True)
class Mode:
    """How an engine may round inside a segment."""

    readings: tuple[tuple[str, int], ...] = ()
    """Operation name and the number of its reading (``bounds.readings``): where values are rounded to binary16."""
    quantizer: Quantizer = "float64"
    narrow: bool = False
    """Whether every result is rounded to binary32, as in an engine that computes in it."""


@dataclass(frozen=True)
class Mistake:
    """A hypothesis: which operations are wrong, how, and in which passes."""

    at: Mapping[str, Candidate]
    """By full name of the operation's output."""
    kind: PassKind | None = None
    """Passes in which it is made, ``prefill`` or ``decode``; None: all."""

    def made_in(self, record: PassRecord) -> bool:
        """Return whether the mistake is made in a pass."""
        return self.kind in (None, record.plan.kind)


@dataclass
class Baseline:
    """The segment computed correctly: values of every pass, and a context for each operation."""

    values: list[MutableMapping[str, TapArray]]
    contexts: dict[tuple[int, str], Context] = field(default_factory=dict)


class HeldWeights:
    """Weights, some of them decoded once: a replay reads those of its own operations hundreds of times."""

    def __init__(self, weights: WeightSource, keep: Collection[str]) -> None:
        self._weights = weights
        self._keep = frozenset(keep)
        self._held: dict[str, Weight] = {}

    def __getitem__(self, name: str, /) -> Weight:
        if name not in self._keep:
            return self._weights[name]
        if name not in self._held:
            self._held[name] = self._weights[name]
        return self._held[name]


class Replay:
    """The operations that lead to one recorded tensor in the passes of a trace."""

    def __init__(
        self,
        table: Sequence[Op],
        config: SpecConfig,
        weights: WeightSource,
        records: Sequence[PassRecord],
        tap: str,
        arithmetic: Arithmetic,
    ) -> None:
        """Determine what must be computed for ``tap`` in the last of ``records``, and for the cache before it.

        Raises:
            Inapplicable: ``tap`` itself was not recorded in that pass.
        """
        if tap not in records[-1].taps:
            raise Inapplicable
        self.table, self.config, self.weights = table, config, weights
        self.records, self.tap, self.arithmetic = records, tap, arithmetic
        self.ops = _needed(table, records, tap)
        self._last = len(records) - 1
        self._mixing = max((i for i, op in enumerate(self.segment) if isinstance(op.kind, Attend)), default=-1)
        self._held: dict[str, Held] = {}
        self._baselines: dict[Mode, Baseline] = {}

    @property
    def segment(self) -> tuple[Op, ...]:
        """Operations computed in the last pass, the recorded one last."""
        return self.ops[self._last]

    @property
    def recorded(self) -> TapArray:
        """The tensor the segment ends in."""
        return self.records[self._last].taps[self.tap]

    def baseline(self, mode: Mode) -> Baseline:
        """Compute the segment without a mistake.

        Raises:
            Inapplicable: something was recorded for too few tokens to go on from.
        """
        if mode not in self._baselines:
            base = Baseline([dict(record.taps) for record in self.records])
            for i in range(len(self.records)):
                for op in self.ops[i]:
                    context = self._context(op, i, base.values, mode)
                    output = self._shaped(op, context, context.expected, mode)
                    if not (i == self._last and op.output == self.tap):
                        base.values[i][op.output] = output
                        context = replace(context, recorded=output.array)
                    base.contexts[i, op.output] = context
            self._baselines[mode] = base
        return self._baselines[mode]

    def context(self, op: Op, mode: Mode) -> Context:
        """Return an operation of the last pass on correctly computed inputs."""
        return self.baseline(mode).contexts[self._last, op.output]

    def run(
        self,
        mistake: Mistake | None,
        mode: Mode,
        probe: Sequence[int] | None = None,
        watch: Callable[[int, Context], None] | None = None,
    ) -> TapArray | None:
        """Compute the segment's last tensor with a mistake; None if it cannot be made.

        ``probe``: tokens of the last pass that are enough, where tokens no longer mix. ``watch`` is shown every
        operation of every pass with the inputs it then has.

        Raises:
            Inapplicable: something was recorded for too few tokens to go on from.
        """
        changed = self.changes(mistake, mode, probe, watch=watch)
        return None if changed is None else changed[self.tap]

    def changes(
        self,
        mistake: Mistake | None,
        mode: Mode,
        probe: Sequence[int] | None = None,
        stop: int | None = None,
        watch: Callable[[int, Context], None] | None = None,
    ) -> Values | None:
        """Return what a mistake changes in the last pass, up to its operation ``stop``; otherwise like ``run``.

        Raises:
            Inapplicable: something was recorded for too few tokens to go on from.
        """
        base = self.baseline(mode)
        changed: list[MutableMapping[str, TapArray]] = [{} for _ in self.records]
        values = [ChainMap(new, old) for new, old in zip(changed, base.values, strict=True)]
        made = False
        for i, record in enumerate(self.records):
            last = i == self._last
            for number, op in enumerate(self.ops[i][:stop] if last else self.ops[i]):
                wrong = mistake is not None and op.output in mistake.at and mistake.made_in(record)
                stale = any(changed) and self._reads_changed(op, i, changed)
                ends = last and op.output == self.tap
                if not (wrong or stale or ends or watch):
                    continue
                context = self._context(op, i, values, mode) if stale else base.contexts[i, op.output]
                if watch is not None:
                    watch(i, context)
                if not (wrong or stale or ends):
                    continue
                output: Array | None = None
                if mistake is not None and wrong:
                    if stale:
                        context = replace(context, recorded=self._like(op, i, base, context))
                    output, made = mistake.at[op.output].compute(context), True
                    if output is None:
                        return None
                tap = self._shaped(op, context, context.expected if output is None else output, mode)
                if probe is not None and last and number >= self._mixing and not ends:
                    tap = _rows(op.output, tap, probe, context.rows)
                changed[i][op.output] = tap
        return changed[self._last] if made or mistake is None else None

    def distance(self, computed: TapArray) -> FloatArray:
        """Return the relative L2 distance of each computed token from the recorded one."""
        have = self.recorded_rows
        rows = have if computed.rows is None else computed.rows
        record, op = self.records[self._last], self.segment[-1]
        recorded = _rows(self.tap, self.recorded, rows, have).array
        seen = Context(op, self.config, self.weights, record.plan, rows, (), recorded)
        return per_token(seen, seen.flat(computed.array))

    def rounds_to_f16(self, mode: Mode) -> bool:
        """Return whether something in the segment is rounded to binary16."""
        numbers = dict(mode.readings)
        return any(
            any(readings(op, self.arithmetic, 2, 2)[numbers[op.name]].rounded)
            for op in self.segment
            if op.name in numbers
        )

    def near_ties(self, mistake: Mistake | None, mode: Mode) -> BoolArray:
        """Return which tokens of the last pass may have changed by an int8 value near a rounding tie.

        A tie in the inputs of keys and values affects every later token.
        """
        tokens: BoolArray = np.zeros(len(self.records[self._last].plan.token_ids), np.bool_)

        def watch(i: int, context: Context) -> None:
            if not context.is_linear:
                return
            # computed activations are twice as uncertain as recorded ones
            near = np.asarray(context.rows)[near_ties(context.inputs[0], 2 * TIE_REACH)]
            if "n_kv_heads" in context.op.axes and near.size:
                tokens[near.min() if i == self._last else 0 :] = True
            elif i == self._last:
                tokens[near] = True

        self.run(mistake, mode, watch=watch)
        return tokens

    # --- one operation ----------------------------------------------------------------------------------------

    def _context(self, op: Op, i: int, values: Sequence[Values], mode: Mode) -> Context:
        record = self.records[i]
        rows = self.rows_of(op, values[i], i)
        rounded = self.rounded(op, len(rows), mode, i)
        held = self._held.setdefault(op.output, Held())
        ends = i == self._last and op.output == self.tap
        recorded = self.recorded.array if ends else np.empty(0)
        if ends and len(rows) < self.recorded.array.shape[token_axis(op.output)]:
            recorded = _rows(op.output, self.recorded, rows, self.recorded_rows).array
        context = Context(
            op,
            self.config,
            self.weights,
            record.plan,
            rows,
            (),
            recorded,
            values[i],
            values[:i],
            rounded,
            quantizer=mode.quantizer,
            held=held,
        )
        return replace(context, raw=tuple(map(context.input, op.inputs)))

    @property
    def recorded_rows(self) -> tuple[int, ...]:
        """Tokens of the last pass that the recorded tensor has."""
        return self.tokens_of(self.recorded)

    def tokens_of(self, tap: TapArray) -> tuple[int, ...]:
        """Return which tokens of the last pass a tensor has."""
        return tuple(range(len(self.records[self._last].plan.token_ids))) if tap.rows is None else tap.rows

    def rows_of(self, op: Op, values: Values, i: int = -1) -> tuple[int, ...]:
        """Return the tokens of pass ``i`` that an operation can be computed for: those that all its inputs have.

        Raises:
            Inapplicable: none.
        """
        rows = tuple(range(len(self.records[i].plan.token_ids)))
        if i in (-1, self._last) and op.output == self.tap:
            rows = self.recorded_rows
        for name in op.inputs:
            found = values.get(name)
            if found is not None and found.rows is not None:
                rows = tuple(row for row in rows if row in found.rows)
        if op.last_row_only and op.output != self.tap:
            rows = rows[-1:]
        if not rows:
            raise Inapplicable
        return rows

    def rounded(self, op: Op, n_rows: int, mode: Mode, i: int = -1) -> tuple[Rounding | None, ...]:
        """Return what each input of an operation of pass ``i`` is rounded to; empty: nothing is."""
        number = dict(mode.readings).get(op.name)
        n_tokens = len(self.records[i].plan.token_ids)
        return () if number is None else readings(op, self.arithmetic, n_tokens, n_rows)[number].rounded

    def _like(self, op: Op, i: int, base: Baseline, context: Context) -> Array:
        """Return an array of the output's shape, against which a variant checks its own."""
        if i == self._last and op.output == self.tap:
            return context.recorded
        right = base.values[i][op.output]
        n_tokens = len(self.records[i].plan.token_ids)
        have = tuple(range(n_tokens)) if right.rows is None else right.rows
        return _rows(op.output, right, context.rows, have).array

    def shaped(self, op: Op, output: Array, mode: Mode) -> Array:
        """Reshape an output to the shape of its tap, and round it as the mode does."""
        if mode.narrow:
            with np.errstate(over="ignore", invalid="ignore"):
                output = output.astype(np.float32).astype(np.float64)
        if isinstance(op.kind, BitLinear) and "head_dim" in op.axes:
            output = output.reshape(output.shape[0], -1, self.config.head_dim)
        return output

    def _shaped(self, op: Op, context: Context, output: Array, mode: Mode) -> TapArray:
        return TapArray(self.shaped(op, output, mode), None if context.whole_pass else context.rows)

    def _reads_changed(self, op: Op, i: int, changed: Sequence[Values]) -> bool:
        return any(
            any(state_source(name) in taken for taken in changed[: i + 1])
            if is_state(name)
            else name in changed[i]
            for name in op.inputs
        )


def _needed(table: Sequence[Op], records: Sequence[PassRecord], tap: str) -> list[tuple[Op, ...]]:
    """Return for each pass the operations to compute, in execution order."""
    cached: set[str] = set()
    found: list[tuple[Op, ...]] = []
    for i in range(len(records) - 1, -1, -1):
        wanted = set(cached)
        if i == len(records) - 1:
            wanted.add(tap)
        ops: list[Op] = []
        for op in reversed(table):
            ends = i == len(records) - 1 and op.output == tap
            if op.output not in wanted or (op.output in records[i].taps and not ends):
                continue
            ops.append(op)
            made_of = {state_source(name) for name in op.inputs if is_state(name)}
            wanted |= made_of.union(op.inputs)
            cached |= made_of
        found.append(tuple(reversed(ops)))
    return found[::-1]


def _rows(name: str, tap: TapArray, wanted: Iterable[int], have: Sequence[int]) -> TapArray:
    """Return some tokens of a tensor whose tokens are ``have``."""
    wanted = frozenset(wanted)
    kept = tuple(row for row in have if row in wanted)
    return TapArray(widen(take_rows(name, tap.array, have, kept)), kept)
