"""The audit of one or several engines over the same weights, layer by layer, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from crossval import capture
from crossval.audit import assembly, bounds
from crossval.audit import evaluate as ev
from crossval.audit.bounds import Arithmetic, Reading
from crossval.audit.checks import AuditResult, OpCheck, decide, first_guilty, only_recorded
from crossval.audit.precision import Survey, arithmetic_of
from crossval.audit.state import Covered, PassState, Pending, Value, gather, stack_state, take_recorded
from crossval.capture import Place, Source
from crossval.errors import BadInputError
from crossval.model.graphs import op_table
from crossval.model.kinds import Weight
from crossval.model.op import Op
from crossval.model.taps import is_state, state_source
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, TapArray
from crossval.terms import Progress

Watch = Callable[[Sequence[str]], None]
"""Called with the taps of each stage (the embedding, a layer, the head) while they are held."""


@dataclass
class _Party:
    """One engine under audit."""

    source: Source
    arithmetic: Arithmetic
    states: list[PassState]
    checks: list[OpCheck] = field(default_factory=list)
    covered: set[tuple[int, str]] = field(default_factory=set)
    recorded: list[Mapping[str, TapArray]] = field(default_factory=list)
    preferred: dict[bool, dict[str, Reading]] = field(default_factory=lambda: {True: {}, False: {}})
    """Readings that fitted segments of passes of one token, and of several: tried first in the next."""
    failed_trials: int = 0
    """Choices of int8 flips tried in vain in all segments."""
    distrusted: frozenset[Place] = frozenset()
    survey: Survey = field(default_factory=Survey)

    def take(self, names: Collection[str]) -> None:
        """Hold these taps of all passes."""
        self.recorded = [record.taps for record in self.source.records(names, ahead=True)]

    def note(self, op: Op, state: PassState, check: OpCheck, computed: Covered) -> None:
        """Keep a check and what it covers."""
        spans = tuple(dict.fromkeys(name for _, name in sorted(computed)))
        self.checks.append(replace(check, spans=spans))
        if check.status != "unchecked":
            self.covered |= {(state.index, op.output), *computed}


class _LayerWeights:
    """Weights of the layer being audited, each decoded once for all engines and passes."""

    def __init__(self, weights: SpecWeights) -> None:
        self._weights = weights
        self._held: dict[str, Weight] = {}

    def __getitem__(self, name: str, /) -> Weight:
        found = self._held.get(name)
        return self._held.setdefault(name, self._weights[name]) if found is None else found

    def drop(self) -> None:
        """Let go of a layer's weights; the next one's are decoded into their memory."""
        self._weights.reuse(self._held.values())
        self._held.clear()


def audit(
    sources: Sequence[Source],
    weights: SpecWeights,
    *,
    progress: Progress | None = None,
    distrusted: Collection[Place] = (),
    watch: Watch | None = None,
) -> list[AuditResult]:
    """Audit engines over their passes; one result per source, in their order.

    Every operation of every pass is recomputed from the inputs the engine itself recorded. Taps that an engine
    does not give are bridged by segments of several operations. ``distrusted``: these are judged, but what reads
    them is judged as if they had not been recorded. ``watch`` sees each stage once.

    An engine that is found to compute in another format than it states is audited again, held to that format.

    Raises:
        BadInputError: no passes, or passes that do not continue each other.
        UnavailableError, EngineCrashError: from a runner.
    """
    for source in sources:
        _check_plans(source.plans)
    n_heads = weights.config.n_heads
    numerics = [source.runner.identity.numerics for source in sources]
    held = [arithmetic_of(one, n_heads, None) for one in numerics]
    results = _audit(sources, held, weights, progress, distrusted, watch)
    for _ in range(2):  # held to what was found; then, if that explains less, to having recorded in it only
        found = [one.precision for one in results]
        meant = [arithmetic_of(one, n_heads, precision) for one, precision in zip(numerics, found, strict=True)]
        again = [i for i in range(len(sources)) if meant[i] != held[i]]
        if not again:
            break
        others = _audit(
            [sources[i] for i in again], [meant[i] for i in again], weights, progress, distrusted, None
        )
        for i, other in zip(again, others, strict=True):
            precision = found[i]
            if precision is not None and only_recorded(precision, other.checks):
                precision = replace(precision, scope="recorded")
            results[i], held[i] = replace(other, precision=precision), meant[i]
    return results


def _audit(
    sources: Sequence[Source],
    arithmetics: Sequence[Arithmetic],
    weights: SpecWeights,
    progress: Progress | None,
    distrusted: Collection[Place],
    watch: Watch | None,
) -> list[AuditResult]:
    """Audit once, each engine held to the arithmetic given for it."""
    config = weights.config
    parties = [
        _Party(
            source,
            arithmetic,
            [PassState(index, plan) for index, plan in enumerate(source.plans)],
            distrusted=frozenset(distrusted),
        )
        for source, arithmetic in zip(sources, arithmetics, strict=True)
    ]
    ops = op_table(config)
    outputs = {op.output for op in ops}
    stages = list(zip(capture.stages(config.n_layers), _stages(ops[:-1]), strict=True))
    held = _LayerWeights(weights)
    # One thread per engine, two for decoding; BLAS gets one, because its own threads wait for each other on a busy
    # machine and then turn a product of a millisecond into hundreds.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(2) as threads:
        for n_done, (names, stage) in enumerate(stages):
            if progress is not None:
                progress("auditing", n_done, len(stages))
            for party in parties:
                party.take([name for name in names if name in outputs])
            if watch is not None:
                watch(names)
            list(threads.map(held.__getitem__, [name for op in stage for name in op.weights]))
            list(threads.map(lambda party, stage=stage: _audit_stage(party, stage, held), parties))
            held.drop()
        _audit_heads(parties, ops[-1], held)
    if progress is not None:
        progress("auditing", len(stages), len(stages))
    return [_result(party, config.n_layers, ops) for party in parties]


def _check_plans(plans: Sequence[PassPlan]) -> None:
    start = 0
    for plan in plans:
        if plan.start != start or not plan.token_ids:
            raise BadInputError("the passes to audit must hold tokens and continue each other from position 0")
        start += len(plan.token_ids)
    if not plans:
        raise BadInputError("there are no passes to audit; auditing nothing is not an audit")


def _stages(ops: Sequence[Op]) -> list[list[Op]]:
    """Split the table into the embedding, one stage per layer, and the final norm; the head comes by itself."""
    stages: list[list[Op]] = []
    key: str | None = None
    for op in ops:
        this = op.output.split(".")[1] if op.output.startswith("blk.") else op.output
        if this != key:
            stages.append([])
            key = this
        stages[-1].append(op)
    return stages


def _order(stage: Sequence[Op], states: Sequence[PassState]) -> Iterator[tuple[Op, PassState]]:
    """Pass by pass within a layer: a later pass reads what earlier ones left in the cache."""
    for state in states:
        for op in stage:
            yield op, state


def _audit_stage(party: _Party, stage: Sequence[Op], weights: _LayerWeights) -> None:
    for taken in party.recorded:
        party.survey.add(taken)
    for op, state in _order(stage, party.states):
        _audit_op(party, op, state, weights)
    _forget(party, stage)


def _audit_op(party: _Party, op: Op, state: PassState, weights: _LayerWeights) -> None:
    for name in op.inputs:
        if is_state(name):
            _fill_state(party, name, state)
    tap = take_recorded(state, party.recorded[state.index], op)
    if tap is None:
        state.values[op.output] = Pending(op)
        return
    check = _judge(party, op, state, tap, weights)
    if check.status == "invalid" or (state.index, op.output) in party.distrusted:
        # what follows is judged as if this tensor had not been recorded, not blamed for it
        state.values[op.output] = Pending(op)


def _judge(party: _Party, op: Op, state: PassState, tap: TapArray, weights: _LayerWeights) -> OpCheck:
    """Judge one recorded output, alone or as the end of a segment."""
    rows = state.all_rows if tap.rows is None else tap.rows
    covered: Covered = frozenset()
    if all(isinstance(state.value(name), Value) for name in op.inputs):
        inputs = gather(op, state, rows)
        if isinstance(inputs, str):
            check = ev.unchecked(op, state, tap, inputs)
        else:
            check = ev.check(op, state, tap, inputs, weights, party.arithmetic)
    else:
        check, covered = _judge_segment(party, op, state, tap, weights)
    party.note(op, state, check, covered)
    return check


def _judge_segment(
    party: _Party, op: Op, state: PassState, tap: TapArray, weights: _LayerWeights
) -> tuple[OpCheck, Covered]:
    invalid = ev.invalid(op, state, tap)
    preferred = party.preferred[state.n_tokens == 1]
    try:
        found, covers = assembly.segment(op, party.states, state, tap, weights, party.arithmetic, preferred)
        covered = covers[op.output] - {(state.index, op.output)}
        if invalid is not None:
            return invalid, covered
        found.failed_trials = party.failed_trials
        outcome = found.settle()
        party.failed_trials = found.failed_trials
    except ValueError as error:
        return ev.unchecked(op, state, tap, str(error)), frozenset()
    if not outcome.beyond and not outcome.excused:
        preferred.update(found.choice.readings)
    assembly.keep(state, outcome, covers)
    return ev.judge_segment(op, state, tap, outcome, covered), covered


def _fill_state(party: _Party, name: str, state: PassState) -> None:
    """Give an op its KV state where all of it was recorded: every row of the tap in the passes up to this one."""
    stacked = stack_state(party.states[: state.index + 1], state_source(name))
    if stacked is not None:
        state.values[name] = stacked


def _forget(party: _Party, stage: Sequence[Op]) -> None:
    """Drop a layer's arrays but for what the next one reads, once no pass needs more to compute that."""
    last = stage[-1].output
    kept = [state.values.get(last) for state in party.states]
    if not all(isinstance(value, Value) for value in kept):
        return
    for state, value in zip(party.states, kept, strict=True):
        assert value is not None
        state.values = {last: value}


def _audit_heads(parties: Sequence[_Party], op: Op, weights: _LayerWeights) -> None:
    """Audit the logits of all engines and passes in one product: the head's table is large and read once."""
    jobs: list[tuple[_Party, PassState, TapArray, npt.NDArray[Any], Reading]] = []
    for party in parties:
        for state in party.states:
            tap = party.recorded[state.index].get(op.output)
            if tap is None:
                continue
            if not isinstance(state.value(op.inputs[0]), Value):
                _judge(party, op, state, tap, weights)
                continue
            rows = state.all_rows if tap.rows is None else tap.rows
            inputs = gather(op, state, rows)
            if isinstance(inputs, str):
                party.note(op, state, ev.unchecked(op, state, tap, inputs), frozenset())
                continue
            readings = bounds.readings(op, party.arithmetic, state.n_tokens, len(rows))
            jobs += [(party, state, tap, inputs[0], reading) for reading in readings]
    if not jobs:
        return
    stacked = [ev.round_inputs([x], reading)[0] for _, _, _, x, reading in jobs]
    table = weights[op.weights[0]]
    logits = op.function(np.concatenate(stacked), table)
    norms = bounds.row_norms(table)  # type: ignore[arg-type]  # the head is a table
    found: dict[tuple[int, int], list[OpCheck]] = {}
    at = 0
    for (party, state, tap, _, reading), x in zip(jobs, stacked, strict=True):
        expected = logits[at : at + len(x)]
        at += len(x)
        check = ev.check_head(op, state, tap, x, expected, norms, party.arithmetic, reading)
        found.setdefault((parties.index(party), state.index), []).append(check)
    for party, state, *_ in jobs:
        checks = found.pop((parties.index(party), state.index), None)
        if checks is not None:
            party.note(op, state, ev.best(checks), frozenset())


def _result(party: _Party, n_layers: int, ops: Sequence[Op]) -> AuditResult:
    order = {op.output: i for i, op in enumerate(ops)}
    checks = tuple(sorted(party.checks, key=lambda c: (c.pass_index, order[c.tap])))
    n_ops, n_covered = len(ops) * len(party.states), len(party.covered)
    identity = party.source.runner.identity
    return AuditResult(
        engine=identity.name,
        checks=checks,
        n_ops=n_ops,
        n_covered=n_covered,
        first_guilty=first_guilty(checks, n_layers),
        verdict=decide(checks, n_ops, n_covered),
        precision=party.survey.found(identity.numerics),
    )
