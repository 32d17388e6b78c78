"""The audit of one or several engines over the same weights, layer by layer, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from crossval import capture
from crossval.audit import bounds, precision, trials, zero_rows
from crossval.audit import evaluate as ev
from crossval.audit.assembly import Assembly, keep
from crossval.audit.bounds import Arithmetic, Reading
from crossval.audit.checks import AuditResult, OpCheck, decide, first_guilty, only_recorded
from crossval.audit.precision import Survey, arithmetic_of
from crossval.audit.products import Choice, StatedWeights, Votes
from crossval.audit.state import Covered, Output, PassState, Pending, Value, stack_state
from crossval.audit.trials import Hopeless
from crossval.capture import Place, Source
from crossval.errors import BadInputError
from crossval.model.graphs import op_table
from crossval.model.kinds import BitLinear, FloatArray, Head, Weight
from crossval.model.op import Op, WeightSource
from crossval.model.taps import is_state, state_source
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan, TapArray
from crossval.terms import Progress

MOST_AUDITS = 4
"""As the engine states; at the format found; as merely recorded in it; with what its projections multiply."""
Watch = Callable[[Sequence[str]], None]
"""Called with the taps of each stage (the embedding, a layer, the head) while they are held."""


@dataclass
class _Engine:
    """One engine under audit."""

    source: Source
    arithmetic: Arithmetic
    file_weights: WeightSource
    """As the model file has them; ``weights``: as the engine multiplies them."""
    distrusted: frozenset[Place]
    ops: Sequence[Op]
    states: list[PassState] = field(init=False)
    checks: list[OpCheck] = field(default_factory=list)
    covered: set[Place] = field(default_factory=set)
    recorded: list[Mapping[str, TapArray]] = field(default_factory=list)
    preferred: dict[bool, dict[str, Reading]] = field(default_factory=lambda: {True: {}, False: {}})
    """Readings that fitted segments of single-token passes (True), and of others: tried first in the next."""
    failed_trials: int = 0
    """Choices of int8 flips tried in vain in all segments."""
    survey: Survey = field(init=False)
    votes: Votes = field(default_factory=Votes)
    weights: WeightSource = field(init=False)
    hopeless: Hopeless | None = None
    """Asked of every check; the audit is given up where it says so."""
    given_up: bool = False

    def __post_init__(self) -> None:
        self.survey = Survey(self.source.runner.identity.numerics, self.ops)
        self.weights = StatedWeights(self.file_weights, self.arithmetic.numerics)
        self.states = [PassState(index, plan) for index, plan in enumerate(self.source.plans)]

    def take(self, names: Collection[str]) -> None:
        """Hold these taps of all passes."""
        self.recorded = [record.taps for record in self.source.records(names, ahead=True)]

    def audit_stage(self, stage: Sequence[Op], *, is_last: bool) -> None:
        """Audit a stage pass by pass: a later pass reads what earlier ones left in the cache.

        What a stage gave is dropped but for its end, which the next one reads; the head, after the last one, reads
        what is not its end.
        """
        for taken in self.recorded:
            self.survey.add(taken)
        for state, op in itertools.product(self.states, stage):
            self._audit_op(op, state)
            if self.given_up:
                return
        if not is_last:
            self._forget(stage[-1].output)

    def output(self, op: Op, state: PassState) -> Output | None:
        """Return what was recorded of an operation."""
        tap = self.recorded[state.index].get(op.output)
        return None if tap is None else Output(op, state, tap, precision.lost(tap, op, self.arithmetic))

    def judge(self, output: Output) -> OpCheck:
        """Judge one recorded output, alone or as the end of a segment."""
        covered: Covered = frozenset()
        if self.arithmetic.zero_rows_nan:
            kept, n_aside = zero_rows.set_aside(output)
            if n_aside:
                return self._judge_rest(output, kept, n_aside)
        if all(isinstance(output.state.value(name), Value) for name in output.op.inputs):
            try:
                inputs = output.inputs()
            except ValueError as error:
                check = ev.unchecked(output, str(error))
            else:
                check = ev.check(output, inputs, self.weights, self.arithmetic)
                if isinstance(output.op.kind, BitLinear) and check.status in ("ok", "guilty"):
                    self._vote(output, inputs[0], wrong=check.wrong)
        else:
            check, covered = self._judge_segment(output)
        self.note(output, check, covered)
        return check

    def _vote(self, output: Output, x: npt.NDArray[Any], *, wrong: bool) -> None:
        weights = [self.file_weights[name] for name in output.op.weights]
        arithmetic = self.arithmetic.of(output.op).storing(output.form_of_inputs(), output.form)
        flat, recorded = x.reshape(len(x), -1), output.array.reshape(len(output.array), -1)
        self.votes.add(flat, recorded, weights, arithmetic, wrong=wrong)

    def _judge_rest(self, output: Output, kept: Output | None, n_aside: int) -> OpCheck:
        """Judge the tokens of an output that are not set aside; it is wrong, or not judged as a whole."""
        found = None if kept is None else self.judge(kept)
        if found is not None and found.wrong:
            return found
        if found is not None:
            self.checks.pop()
        check = ev.unchecked(output, f"{n_aside} of {len(output.rows)} tokens: {zero_rows.WHY}")
        self.note(output, check)
        return check

    def note(self, output: Output, check: OpCheck, computed: Covered = frozenset()) -> None:
        """Keep a check and what it covers."""
        spans = tuple(dict.fromkeys(name for _, name in sorted(computed)))
        self.checks.append(replace(check, spans=spans) if spans else check)
        self.given_up = self.given_up or (self.hopeless is not None and self.hopeless(check))
        if check.status != "unchecked":
            self.covered |= {output.place, *computed}

    def result(self, ops: Sequence[Op]) -> AuditResult:
        """Return what was found; ``ops``: all operations of the model, in order."""
        order = {op.output: i for i, op in enumerate(ops)}
        checks = tuple(sorted(self.checks, key=lambda check: (check.pass_index, order[check.tap])))
        n_ops, n_covered = len(ops) * len(self.states), len(self.covered)
        identity = self.source.runner.identity
        return AuditResult(
            engine=identity.name,
            checks=checks,
            n_ops=n_ops,
            n_covered=n_covered,
            first_guilty=first_guilty(checks),
            verdict=decide(checks, n_ops, n_covered),
            precision=self.survey.found(),
            products=self.votes.found(self.arithmetic.numerics, identity.numerics),
        )

    def _audit_op(self, op: Op, state: PassState) -> None:
        for name in op.inputs:
            if is_state(name):
                stacked = stack_state(self.states[: state.index + 1], state_source(name))
                if stacked is not None:
                    state.values[name] = stacked
        output = self.output(op, state)
        if output is not None and self.judge(output).status != "invalid" and output.place not in self.distrusted:
            state.values[op.output] = Value(output.array, output.rows, output.form)
        else:  # what follows is judged as if this tensor had not been recorded, not blamed for it
            state.values[op.output] = Pending(op)

    def _judge_segment(self, output: Output) -> tuple[OpCheck, Covered]:
        invalid = ev.invalid(output)
        preferred = self.preferred[output.state.n_tokens == 1]
        try:
            found, covers = Assembly(self.states, self.weights, self.arithmetic, preferred).segment(output)
            covered = covers[output.op.output] - {output.place}
            if invalid is not None:
                return replace(invalid, n_ops=1 + len(covered)), covered
            found.failed_trials = self.failed_trials
            outcome = found.settle()
            self.failed_trials = found.failed_trials
        except ValueError as error:
            return ev.unchecked(output, str(error)), frozenset()
        if not outcome.beyond and not outcome.excused:
            preferred.update(found.readings)
        keep(output.state, outcome, covers)
        return ev.judge_segment(output, outcome, covered), covered

    def _forget(self, last: str) -> None:
        """Drop a layer's arrays but for the last, which the next one reads, once every pass has that."""
        kept = [value for state in self.states if isinstance(value := state.values.get(last), Value)]
        if len(kept) == len(self.states):
            for state, value in zip(self.states, kept, strict=True):
                state.values = {last: value}


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

    An engine that is found to compute in another format than it states, or to multiply something else in its
    projections, is audited again, judged as such.

    Raises:
        BadInputError: no passes, or passes that do not continue each other.
        UnavailableError, EngineCrashError: from a runner.
    """
    for source in sources:
        _check_plans(source.plans)
    numerics = [source.runner.identity.numerics for source in sources]
    judged_by = [arithmetic_of(one, None, weights.config) for one in numerics]
    results = _audit(sources, judged_by, weights, progress, distrusted, watch)
    for _ in range(MOST_AUDITS - 1):
        meant = [
            _arithmetic_of(one, stated, judged, weights)
            for one, stated, judged in zip(results, numerics, judged_by, strict=True)
        ]
        again = [i for i in range(len(sources)) if meant[i] != judged_by[i]]
        if not again:
            break
        others = _audit(
            [sources[i] for i in again], [meant[i] for i in again], weights, progress, distrusted, None
        )
        for i, other in zip(again, others, strict=True):
            found = results[i].precision
            if found is not None and only_recorded(found, other.checks):
                found = replace(found, scope="recorded")
            multiplied, before = other.products, results[i].products
            if multiplied is not None and before is not None:
                multiplied = replace(multiplied, alternatives=before.alternatives)
            results[i], judged_by[i] = replace(other, precision=found, products=multiplied), meant[i]
    for i, (source, arithmetic) in enumerate(zip(sources, judged_by, strict=True)):

        def under(
            choice: Choice, hopeless: Hopeless, source: Source = source, judged: Arithmetic = arithmetic
        ) -> AuditResult | None:
            multiplies = replace(judged.numerics, activation_quantization=choice[0], weights=choice[1])
            other = replace(judged, numerics=multiplies)
            found = _audit([source], [other], weights, progress, distrusted, None, hopeless)
            return found[0] if found else None

        results[i] = trials.search(results[i], arithmetic.numerics, under) or results[i]
    return results


def _arithmetic_of(
    result: AuditResult, stated: Numerics, judged_by: Arithmetic, weights: SpecWeights
) -> Arithmetic:
    """Return the arithmetic that an audit shows: its format first, then what projections multiply in it."""
    at_format = arithmetic_of(stated, result.precision, weights.config)
    before = replace(judged_by.numerics, activation_quantization=None, weights=None)
    if before != replace(at_format.numerics, activation_quantization=None, weights=None):
        return at_format
    return arithmetic_of(stated, result.precision, weights.config, result.products)


def _audit(
    sources: Sequence[Source],
    arithmetics: Sequence[Arithmetic],
    weights: SpecWeights,
    progress: Progress | None,
    distrusted: Collection[Place],
    watch: Watch | None,
    hopeless: Hopeless | None = None,
) -> list[AuditResult]:
    """Audit once, each engine judged by the arithmetic given for it; no results when one is given up."""
    held = _LayerWeights(weights)
    ops = op_table(weights.config)
    engines = [
        _Engine(source, arithmetic, held, frozenset(distrusted), ops, hopeless=hopeless)
        for source, arithmetic in zip(sources, arithmetics, strict=True)
    ]
    outputs = {op.output for op in ops}
    (head,) = (op for op in ops if isinstance(op.kind, Head))
    rest = [op for op in ops if op is not head]
    stages = list(zip(capture.stages(weights.config), _stages(rest), strict=True))
    # One thread per engine, two for decoding; BLAS gets one, because its own threads wait for each other on a busy
    # machine and then turn a product of a millisecond into hundreds.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(2) as threads:
        for n_done, (names, stage) in enumerate(stages):
            if progress is not None:
                progress("auditing", n_done, len(stages))
            for engine in engines:
                engine.take([name for name in names if name in outputs])
            if watch is not None:
                watch(names)
            list(threads.map(held.__getitem__, [name for op in stage for name in op.weights]))
            last = n_done == len(stages) - 1
            list(threads.map(lambda one, ops=stage, last=last: one.audit_stage(ops, is_last=last), engines))
            held.drop()
            if any(engine.given_up for engine in engines):
                return []
        _audit_heads(engines, head, held)
    if progress is not None:
        progress("auditing", len(stages), len(stages))
    return [engine.result(ops) for engine in engines]


def _check_plans(plans: Sequence[PassPlan]) -> None:
    start = 0
    for plan in plans:
        if plan.start != start or not plan.token_ids:
            raise BadInputError("the passes to audit must hold tokens and continue each other from position 0")
        start += len(plan.token_ids)
    if not plans:
        raise BadInputError("there are no passes to audit; auditing nothing is not an audit")


def _stages(ops: Sequence[Op]) -> list[list[Op]]:
    """Split the table into what is before the layers, one stage per layer, and what is after them."""
    return [list(stage) for _, stage in itertools.groupby(ops, key=lambda op: op.layer)]


def _audit_heads(engines: Sequence[_Engine], op: Op, weights: _LayerWeights) -> None:
    """Audit the logits of all engines and passes in one product: the LM head's table is large and read once."""
    waiting: list[tuple[_Engine, Output, list[tuple[Reading, FloatArray]]]] = []
    for engine in engines:
        for output in filter(None, (engine.output(op, state) for state in engine.states)):
            if engine.arithmetic.zero_rows_nan and zero_rows.set_aside(output)[1]:
                engine.judge(output)
                continue
            try:
                (x,) = output.inputs()
            except ValueError:
                engine.judge(output)
                continue
            readings = bounds.readings(op, engine.arithmetic, output.state.n_tokens, len(output.rows))
            waiting.append((engine, output, [(reading, reading.apply(0, x)) for reading in readings]))
    if not waiting:
        return
    stacked = [x for _, _, read in waiting for _, x in read]
    table = weights[op.weights[0]]
    logits = op.function(np.concatenate(stacked), table)
    expected = iter(np.split(logits, np.cumsum([len(x) for x in stacked])))
    kind = waiting[0][0].arithmetic.head_table  # the model's, so that of every engine
    norms = bounds.row_norms(table, kind)  # type: ignore[arg-type]  # the head is a table
    for engine, output, read in waiting:
        checks = (ev.check_head(output, x, next(expected), norms, engine.arithmetic, r) for r, x in read)
        engine.note(output, ev.best(list(checks)))
