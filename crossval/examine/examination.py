"""The whole examination of two engines: compared end to end, each audited, wrong operations diagnosed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.audit import summary
from crossval.audit.audit import Watch, audit
from crossval.audit.checks import AuditResult
from crossval.audit.precision import differs
from crossval.audit.recording import settle
from crossval.capture import Capture, Source
from crossval.compare.layers import Comparison
from crossval.compare.rows import LayersResult
from crossval.diagnose.findings import Finding, find
from crossval.model.weights import SpecWeights
from crossval.passes import Runner
from crossval.terms import SIDES, Progress, Side


@dataclass(frozen=True)
class Examination:
    """The direct comparison of two engines, the audit of each over the same passes, and what was found."""

    result: LayersResult
    audits: Mapping[Side, AuditResult]
    findings: tuple[Finding, ...]
    """One per engine with a wrong operation, the candidate's first."""
    captures: tuple[Capture, Capture]
    """The candidate and the reference over the passes of the result, and what is held of them."""

    def audits_json(self) -> dict[Side, dict[str, Any] | None]:
        """Return both audits as a receipt holds them."""
        return {side: summary.to_json(found) for side, found in self.audits.items()}


def examine(
    candidate: Runner,
    reference: Runner,
    prompt_ids: Sequence[int],
    model_path: str | Path,
    *,
    n_decode: int | None = None,
    full: bool = False,
    progress: Progress | None = None,
    question_recording: bool = True,
    diagnosed: bool = True,
    follow_reference_graph: bool = False,
) -> Examination:
    """Compare two entered runners tap by tap, audit both over the same passes, and diagnose what is wrong.

    ``question_recording``: find out whether a wrong tensor was only recorded wrongly
    (``crossval.audit.recording``). ``diagnosed``: look for the cause of a wrong operation; no verdict depends on
    it, and it takes most of the time. ``follow_reference_graph``: both engines are held to what the reference's
    generation computes, even where that is not the model (``crossval.model.reference_graph``).

    Raises:
        BadInputError: empty prompt, a trace recorded with other tokens, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    weights = SpecWeights(model_path)
    if follow_reference_graph:
        weights = weights.following(reference.identity.numerics.generation)
    ours, theirs = Capture(candidate, weights.config), Capture(reference, weights.config)
    follows = weights.config.follows is not None
    comparison = Comparison(ours, theirs, prompt_ids, n_decode=n_decode, full=full, nan_aside=follows)
    comparison.outline(progress)
    audits, findings = audit_both(
        ours,
        theirs,
        weights,
        question_recording=question_recording,
        diagnosed=diagnosed,
        progress=progress,
        watch=comparison.operations,
    )
    # agreement, too, is within the precision that the audits found
    computed = {one.precision.dtype for one in audits.values() if one.precision and differs(one.precision)}
    return Examination(comparison.result(computed), audits, findings, (ours, theirs))


def audit_both(
    candidate: Source,
    reference: Source,
    weights: SpecWeights,
    *,
    question_recording: bool = True,
    diagnosed: bool = True,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> tuple[dict[Side, AuditResult], tuple[Finding, ...]]:
    """Audit two engines over the same passes and diagnose wrong operations, the candidate's finding first.

    ``question_recording``: find out whether a wrong tensor was only recorded wrongly; ``diagnosed``: look for the
    cause; without it there are no findings. ``watch`` sees each stage while both engines' tensors are held.

    Raises:
        BadInputError: passes that do not continue each other, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    results = audit([candidate, reference], weights, progress=progress, watch=watch)
    audits: dict[Side, AuditResult] = {}
    findings = []
    for side, source, result in zip(SIDES, (candidate, reference), results, strict=True):
        if question_recording:
            settled = settle(source, result, weights, progress=progress)
            source, result = settled.source, settled.result
        audits[side] = result
        found = find(side, source, result, weights) if diagnosed else None
        findings += [] if found is None else [found]
    return audits, tuple(findings)
