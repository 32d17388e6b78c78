"""The harness's results on a recording."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import AuditResult
from crossval.capture import Capture
from crossval.diagnose.diagnosis import Diagnosis
from crossval.diagnose.search import diagnose_passes
from crossval.diagnose.variants import of_records
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray
from tests.zoo.recording import Recording


class Replay:
    """A recording as a runner."""

    status = "recorded"

    def __init__(self, recording: Recording) -> None:
        self._passes = recording.passes
        self._next = 0
        self.identity: EngineIdentity = recording.identity
        self.plan: tuple[PassPlan, ...] = tuple(record.plan for record in recording.passes)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        raise NotImplementedError("a recording has no tokenizer")

    def reset(self) -> None:
        self._next = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = self._passes[self._next]
        self._next += 1
        assert record.plan.token_ids == tuple(token_ids)
        taps: dict[str, TapArray] = {name: tap for name, tap in record.taps.items() if name in select}
        return PassRecord(record.plan, taps)


def audited(recording: Recording, weights: SpecWeights) -> AuditResult:
    """Audit a recording against the correct weights."""
    (result,) = audit([replayed(recording, weights)], weights)
    return result


def replayed(recording: Recording, weights: SpecWeights) -> Capture:
    """Return a recording as what an audit asks."""
    runner = Replay(recording)
    return Capture(runner, weights.config, runner.plan)


def named(recording: Recording, result: AuditResult, weights: SpecWeights) -> Diagnosis | None:
    """Diagnose the first finding from all passes in which that operation is wrong; None without a finding.

    An array of the wrong shape has no diagnosis either.
    """
    first = result.first_guilty
    if first is None or "shape" in (first.note or ""):
        return None
    (op,) = (op for op in op_table(weights.config) if op.output == first.tap)
    arithmetic = Arithmetic(recording.identity.numerics, weights.config.n_heads)
    return diagnose_passes(
        [
            of_records(op, recording.passes, weights.config, weights, index=check.pass_index)
            for check in result.checks
            if check.tap == first.tap and check.status in ("guilty", "invalid")
        ],
        arithmetic,
    )
