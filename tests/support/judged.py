"""The verdict on a recording: verdict, exit code and first finding, as in a receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossval.audit.checks import OpCheck
from crossval.cli.exits import EXIT_OF_VERDICT
from crossval.diagnose.findings import Finding
from crossval.examine import layers_receipt
from crossval.examine.examination import Examination, examine
from crossval.examine.verdict import Verdict
from crossval.passes import Runner


@dataclass(frozen=True)
class Judged:
    """A verdict, and what it is based on."""

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
    """Compare two entered runners as ``crossval layers`` does; ``diagnosed``: with the cause of what is wrong."""
    found = examine(candidate, reference, prompt, model, n_decode=n_decode, diagnosed=diagnosed)
    verdict = verdict_of(found)
    return Judged(
        verdict,
        EXIT_OF_VERDICT[verdict],
        found.audits["candidate"].first_guilty,
        found.audits["reference"].first_guilty,
        next((one for one in found.findings if one.side == "candidate"), None),
        found,
    )


def verdict_of(found: Examination) -> Verdict:
    """Return the verdict that a receipt of this examination holds."""
    examined = layers_receipt.Examined(found.result, found.audits_json())
    return layers_receipt.verdict(examined, layers_receipt.summarize(examined))
