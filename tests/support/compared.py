"""Two engines compared tap by tap without their audits."""

from __future__ import annotations

from collections.abc import Sequence

from crossval.capture import Capture, stages
from crossval.compare.layers import Comparison
from crossval.compare.rows import LayersResult
from crossval.terms import Progress


def compare_layers(
    candidate: Capture,
    reference: Capture,
    prompt_ids: Sequence[int],
    *,
    n_decode: int | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> LayersResult:
    comparison = Comparison(candidate, reference, prompt_ids, n_decode=n_decode, full=full)
    comparison.outline(progress)
    for names in stages(candidate.config):
        comparison.operations(names)
    return comparison.result()
