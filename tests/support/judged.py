"""What the product says of a recording: verdict, exit code and first finding, as a receipt has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossval.audit.checks import OpCheck
from crossval.cli.app import EXIT_OF_VERDICT
from crossval.diagnose.findings import Finding
from crossval.engines.party import Party
from crossval.examine.examination import Examination, examine
from crossval.examine.verdict import Verdict
from crossval.passes import Runner
from crossval.receipts import evidence


@dataclass(frozen=True)
class Judged:
    """A verdict, and what it rests on."""

    verdict: Verdict
    exit_code: int
    guilty: OpCheck | None
    """First finding of the candidate's audit."""
    reference_guilty: OpCheck | None
    finding: Finding | None
    """The diagnosis of the candidate."""
    found: Examination


def judge(
    candidate: Runner,
    reference: Runner,
    prompt: Sequence[int],
    model: Path,
    *,
    n_decode: int,
    diagnosed: bool = True,
) -> Judged:
    """Compare two entered runners as ``crossval layers`` does; ``diagnosed``: with the cause of what is guilty."""
    found = examine(candidate, reference, prompt, model, n_decode=n_decode, diagnosed=diagnosed)
    verdict = verdict_of(found, reference)
    return Judged(
        verdict,
        EXIT_OF_VERDICT[verdict],
        found.audits["candidate"].first_guilty,
        found.audits["reference"].first_guilty,
        next((one for one in found.findings if one.side == "candidate"), None),
        found,
    )


def verdict_of(found: Examination, reference: Runner) -> Verdict:
    """Return the verdict that a receipt of this examination holds."""
    summary = evidence.summarize_layers(found.result)
    audits = found.audits_json()
    evidence.finish_summary("layers", summary, Party(reference.status, reference.identity), None, audits)
    verdict: Verdict = summary["verdict"]
    return verdict
