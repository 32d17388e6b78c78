"""The first wrong operation of an engine: captured again with everything around it, and diagnosed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from threadpoolctl import threadpool_limits

from crossval.audit import extent, feeding
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import AuditResult, OpCheck, first_guilty
from crossval.audit.precision import arithmetic_of, storing
from crossval.audit.products import StatedWeights
from crossval.capture import Source, model_taps
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis
from crossval.diagnose.probing import by_the_head, tell_apart
from crossval.diagnose.replay import HeldWeights, Replay
from crossval.diagnose.search import diagnose_passes
from crossval.diagnose.segment import diagnose_segment, remedy
from crossval.diagnose.variants import FAMILIES, Context, Inapplicable, of_records
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import Attend, AttentionScores, Softmax
from crossval.model.op import Op, WeightSource
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord
from crossval.terms import LOGITS, Side

MAX_BYTES = 256 << 20
"""Maximum memory for the same tensors of other layers."""
MAX_PASSES = 4
"""Wrong passes that are diagnosed together: one cause has to explain all of them."""


@dataclass(frozen=True)
class Finding:
    """What is first wrong with an engine, and why."""

    side: Side
    check: OpCheck
    arithmetic: Arithmetic
    diagnosis: Diagnosis
    context: Context | None
    """The operation as the engine recorded it in the pass of ``check``; None when its inputs were not recorded."""
    further: Finding | None = None
    """The first operation that makes NaN or infinity of finite values, if it is another one with a known cause."""

    @property
    def in_segment(self) -> bool:
        """Whether it concerns a segment: several operations checked as one."""
        return self.check.n_ops > 1


def find(side: Side, source: Source, result: AuditResult, weights: SpecWeights) -> Finding | None:
    """Diagnose the first wrong operation of an audit, and where NaN enters after it; None when nothing is wrong.

    Needs the operation's layer in the passes up to the wrong ones: the engine runs again if it is not held.

    Raises:
        UnavailableError, EngineCrashError: from the runner.
    """
    if result.first_guilty is None:
        return None
    found = _of_check(side, source, result, result.first_guilty, weights)
    spoilt = first_guilty(check for check in result.checks if check.n_nonfinite)
    if spoilt is None or spoilt.n_ops > 1 or spoilt.place == result.first_guilty.place:
        return found
    further = _of_check(side, source, result, spoilt, weights)
    return replace(found, further=further) if further.diagnosis.determined else found


def _of_check(side: Side, source: Source, result: AuditResult, check: OpCheck, weights: SpecWeights) -> Finding:
    """Diagnose one wrong operation."""
    runner = source.runner
    arithmetic = arithmetic_of(runner.identity.numerics, result.precision, weights.config, result.products)
    multiplied = StatedWeights(weights, arithmetic.numerics)
    why = _why_not(check)
    if why is not None:
        return Finding(side, check, arithmetic, _undetermined(why), None)
    passes = _passes(result, check)
    op = next(op for op in op_table(weights.config) if op.output == check.tap)
    n_passes = max(passes) + 1
    plans = source.plans[:n_passes]
    names = _names(check.tap, weights.config, check.n_ops)
    if check.n_ops > 1:
        records = source.records(names, n_passes)
        return Finding(
            side, check, arithmetic, _inside(check, records, passes, weights.config, multiplied, arithmetic), None
        )
    names = list(dict.fromkeys([*names, *_elsewhere(op, weights.config, plans)]))
    records = source.records(names, n_passes)
    arithmetic = storing(arithmetic, op, records[check.pass_index].taps)
    contexts = []
    for index in passes:
        try:
            contexts.append(of_records(op, records, weights.config, multiplied, index=index))
        except (
            BadInputError
        ) as error:  # not recorded there: values that are not finite are wrong whatever they were computed from
            if index == check.pass_index:
                return Finding(side, check, arithmetic, _undetermined(str(error)), None)
    right = [
        of_records(op, records, weights.config, multiplied, index=index) for index in _right(result, check, passes)
    ]
    with threadpool_limits(1, user_api="blas"):
        found = diagnose_passes(contexts, arithmetic, right=right)
        found = tell_apart(found, runner, op, names, plans[0].token_ids, weights.config, multiplied, arithmetic)
    if check.tap == feeding.EMBEDDING:
        found = by_the_head(found, source.records([check.tap, LOGITS], n_passes), weights.config)
    if check.tap == feeding.EMBEDDING and not found.determined:
        told = [
            feeding.words(index, ids, plans[index].token_ids)
            for index, ids in feeding.embedded(source, weights, n_passes).items()
            if index in passes and ids != list(plans[index].token_ids)
        ]
        found = replace(found, explanation="; ".join([found.explanation, *told]))
    return Finding(side, check, arithmetic, found, contexts[0])


def _inside(
    check: OpCheck,
    records: Sequence[PassRecord],
    passes: Sequence[int],
    config: SpecConfig,
    weights: WeightSource,
    arithmetic: Arithmetic,
) -> Diagnosis:
    """Look for the cause inside a segment."""
    table = op_table(config)
    layers = {taps.parse(name).layer for record in records for name in record.taps} | {taps.parse(check.tap).layer}
    own = {name for op in table if taps.parse(op.output).layer in layers for name in op.weights}
    held = HeldWeights(weights, own)
    try:
        replays = [Replay(table, config, held, records[: index + 1], check.tap, arithmetic) for index in passes]
        with threadpool_limits(1, user_api="blas"):
            return diagnose_segment(replays, arithmetic)
    except Inapplicable:
        return _undetermined(
            f"it is the last of {check.n_ops} operations judged as one; {remedy([*check.spans, check.tap])}"
        )


def _why_not(check: OpCheck) -> str | None:
    """Return why an operation cannot be diagnosed."""
    if check.status == "invalid" and not check.n_nonfinite:
        return check.note or "the recorded array cannot be used"
    return check.note if check.explained else None


def _passes(result: AuditResult, first: OpCheck) -> list[int]:
    """Return the passes to diagnose: the first wrong one, the first of the other kind, then those that follow."""
    alike = [
        check
        for check in result.checks
        if check.tap == first.tap
        and (check.n_ops > 1) == (first.n_ops > 1)
        and check.status in ("guilty", "invalid")
        and _why_not(check) is None
    ]
    alike.sort(key=lambda check: (check is not first, check.pass_kind == first.pass_kind, check.pass_index))
    others = [check for check in alike[1:] if check.pass_kind != first.pass_kind][:1]
    rest = [check for check in alike[1:] if check not in others]
    return [check.pass_index for check in [first, *others, *rest][:MAX_PASSES]]


def _right(result: AuditResult, first: OpCheck, passes: Sequence[int]) -> list[int]:
    """Return captured passes of the same kind in which the operation is correct."""
    return [
        check.pass_index
        for check in result.checks
        if check.tap == first.tap
        and check.status == "ok"
        and check.n_ops == 1
        and check.pass_kind == first.pass_kind
        and check.pass_index < max(passes)
    ][:MAX_PASSES]


def _names(tap: str, config: SpecConfig, n_ops: int = 1) -> list[str]:
    """Return what is captured: the operation's layer and what the layer reads; for the LM head, the last layer.

    For a segment of ``n_ops`` operations also the layers in which it may begin.
    """
    layer = taps.parse(tap).layer
    known = model_taps(config)
    if tap in taps.INPUT_TAPS:
        return [name for name in taps.INPUT_TAPS if name in known]
    ends = list(taps.HEAD_TAPS) if layer is None else []
    layer = config.n_layers - 1 if layer is None else layer
    least = sum(name.startswith("blk.0.") for name in known) - len(taps.SUB_NORMS)
    first = max(0, layer - n_ops // least)
    before = taps.INPUT_TAPS if first == 0 else (f"blk.{first - 1}.l_out",)
    inside = [name for i in range(first, layer + 1) for name in taps.layer_taps(i)]
    return [name for name in (*before, *inside, *ends) if name in known]


def _elsewhere(op: Op, config: SpecConfig, plans: Sequence[PassPlan]) -> list[str]:
    """Return what an operation computes and reads in other layers, if memory allows holding all of it."""
    layer = taps.parse(op.output).layer
    if layer is None:
        return []
    n_tokens = sum(len(plan.token_ids) for plan in plans)
    widest = max(
        config.hidden_dim,
        config.n_heads * n_tokens if isinstance(op.kind, AttentionScores | Softmax | Attend) else 0,
    )
    wanted = {op.name, *taps.STATES.values(), *(name.split(".")[-1] for name in op.inputs)}
    kinds = [tap for tap in taps.LAYER_TAPS if tap in wanted]
    if len(kinds) * config.n_layers * n_tokens * widest * 4 > MAX_BYTES:
        return []
    return [f"blk.{other}.{kind}" for other in range(config.n_layers) for kind in kinds]


def _undetermined(why: str) -> Diagnosis:
    return Diagnosis(UNDETERMINED, None, why, None, None, None, 0.0)


def to_json(finding: Finding, command: str) -> dict[str, Any]:
    """Return a finding as an item of the receipt's ``diagnosis``; ``command`` writes its reproducer."""
    check, found = finding.check, finding.diagnosis
    name, segment = taps.parse(check.tap), extent.of_check(check)
    looked_at = finding.context is not None or found.specification_ratio > 0.0
    return {
        "party": finding.side,
        "tap": check.tap,
        "layer": name.layer,
        "op": name.tap,
        "pass_index": check.pass_index,
        "pass_kind": check.pass_kind,
        "name": found.name,
        "family": None if found.family is None else FAMILIES[found.family],
        "explanation": found.explanation,
        "ratio": found.ratio,
        "runner_up": found.runner_up,
        "runner_up_ratio": found.runner_up_ratio,
        "specification_ratio": found.specification_ratio if looked_at else None,
        **({} if segment is None else {"segment": segment}),
        "candidates": [
            {"name": one.name, "family": FAMILIES[one.family], "explanation": one.sentence}
            for one in found.candidates
        ],
        "command": command,
        **({"segment_ops": list(found.segment_ops)} if finding.in_segment else {}),
        **({} if finding.further is None else {"further": _further(finding.further)}),
    }


def _further(finding: Finding) -> dict[str, Any]:
    check, found = finding.check, finding.diagnosis
    return {
        "tap": check.tap,
        "pass_index": check.pass_index,
        "pass_kind": check.pass_kind,
        "name": found.name,
        "explanation": found.explanation,
    }
