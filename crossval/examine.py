"""The whole examination of two engines: compared end to end, then each audited against the specification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.answers import Side
from crossval.audit import summary
from crossval.audit.checks import AuditResult
from crossval.audit.run import audit
from crossval.compare import LayersResult
from crossval.localize import Progress, compare_layers
from crossval.runners.base import Runner
from crossval.spec_weights import SpecWeights


@dataclass(frozen=True)
class Examination:
    """The direct comparison of two engines, and the audit of each over the same passes."""

    result: LayersResult
    audits: Mapping[Side, AuditResult]

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
) -> Examination:
    """Compare two entered runners tap by tap, then audit both over the passes of that comparison.

    Raises:
        BadInputError: empty prompt, a trace recorded with other tokens, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    result = compare_layers(
        candidate, reference, prompt_ids, n_layers=n_layers, n_decode=n_decode, full=full, progress=progress
    )
    weights = SpecWeights(model_path)
    ours, theirs = audit([candidate, reference], result.plan, weights, progress=progress)
    return Examination(result, {"candidate": ours, "reference": theirs})
