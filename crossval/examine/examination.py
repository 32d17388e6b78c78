"""The whole examination of two engines: compared end to end, each audited, what is guilty diagnosed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.audit import summary
from crossval.audit.audit import audit
from crossval.audit.checks import AuditResult
from crossval.audit.precision import differs
from crossval.audit.recording import settle
from crossval.compare.layers import Progress, compare_layers
from crossval.compare.rows import LayersResult
from crossval.diagnose.findings import Finding, find
from crossval.formats import Dtype
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, Runner
from crossval.terms import Side


@dataclass(frozen=True)
class Examination:
    """The direct comparison of two engines, the audit of each over the same passes, and what was found."""

    result: LayersResult
    audits: Mapping[Side, AuditResult]
    findings: tuple[Finding, ...]
    """Of each guilty engine, the candidate's first."""

    def audits_json(self) -> dict[Side, dict[str, Any] | None]:
        """Return both audits as a receipt holds them."""
        return {side: summary.to_json(found) for side, found in self.audits.items()}


def examine(
    candidate: Runner,
    reference: Runner,
    prompt_ids: Sequence[int],
    model_path: str | Path,
    *,
    n_layers: int,
    n_decode: int | None = None,
    full: bool = False,
    progress: Progress | None = None,
    question_recording: bool = True,
    diagnosed: bool = True,
) -> Examination:
    """Compare two entered runners tap by tap, audit both over the same passes, and diagnose what is guilty.

    ``question_recording``: find out whether what is guilty was recorded wrongly (``crossval.audit.recording``);
    ``diagnosed``: look for the cause of what is guilty. No verdict depends on it, and most of the time goes there.

    Raises:
        BadInputError: empty prompt, a trace recorded with other tokens, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """

    def compare(computed: Collection[Dtype] = ()) -> LayersResult:
        return compare_layers(
            candidate, reference, prompt_ids, n_layers=n_layers, n_decode=n_decode, full=full, computed=computed,
            progress=progress,
        )  # fmt: skip

    result = compare()
    audits, findings = audit_both(
        candidate,
        reference,
        result.plan,
        SpecWeights(model_path),
        question_recording=question_recording,
        diagnosed=diagnosed,
        progress=progress,
    )
    computed = {one.precision.dtype for one in audits.values() if one.precision and differs(one.precision)}
    if computed:  # agreement, too, is within the precision that the audits found
        result = compare(computed)
    return Examination(result, audits, findings)


def audit_both(
    candidate: Runner,
    reference: Runner,
    plan: Sequence[PassPlan],
    weights: SpecWeights,
    *,
    question_recording: bool = True,
    diagnosed: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[Side, AuditResult], tuple[Finding, ...]]:
    """Audit two entered runners over the same passes and diagnose what is guilty, the candidate's finding first.

    ``question_recording``: ask of a guilty tensor whether only its recording is wrong; ``diagnosed``: look for the
    cause; without it there are no findings.

    Raises:
        BadInputError: passes that do not continue each other, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    ours, theirs = audit([candidate, reference], plan, weights, progress=progress)
    if question_recording:
        settled = settle(candidate, ours, plan, weights, progress=progress)
        candidate, ours = settled.runner, settled.result
        settled = settle(reference, theirs, plan, weights, progress=progress)
        reference, theirs = settled.runner, settled.result
    audits: dict[Side, AuditResult] = {"candidate": ours, "reference": theirs}
    if not diagnosed:
        return audits, ()
    found = (
        find("candidate", candidate, ours, plan, weights),
        find("reference", reference, theirs, plan, weights),
    )
    return audits, tuple(one for one in found if one is not None)
