"""The outcome of each case: where it actually shows, and what the harness reported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from crossval.audit.checks import AuditResult, OpCheck
from crossval.audit.recording import settle
from crossval.diagnose.diagnosis import Diagnosis
from crossval.examine.verdict import Verdict, arbitrate
from tests.zoo.catalogue import CASES
from tests.zoo.detect import audited, named, replayed
from tests.zoo.fault import Case, TraceFault
from tests.zoo.names import is_right, patterns
from tests.zoo.recording import Difference, first_difference
from tests.zoo.world import World, is_about_tokens

Naming = Literal["right", "undetermined", "wrong", "nameless"]
"""``nameless``: there is no name for this fault, and none was given."""


@dataclass(frozen=True)
class Outcome:
    """One case and its outcome."""

    case: Case
    shown: Difference | None
    """First difference in bits from the healthy engine, without the harness."""
    found: OpCheck | None
    """First finding of the audit."""
    as_candidate: Verdict
    as_reference: Verdict
    """Verdicts with the faulty engine on either side and the healthy one on the other."""
    diagnosis: Diagnosis | None = None
    """None where the case was not diagnosed."""
    acquitted: bool = False
    """Whether a recording error is reported, although the engine is wrong; only if the case was diagnosed."""

    @property
    def in_place(self) -> bool:
        """Whether the fault shows first where the catalogue says."""
        return self.shown is not None and self._expected == (self.shown.tap, self.shown.pass_kind)

    @property
    def detected(self) -> bool:
        """Whether the harness detected anything."""
        return self.found is not None

    @property
    def right_side(self) -> bool:
        """Whether the harness reports the faulty engine, whichever side it is on."""
        return (self.as_candidate, self.as_reference) == ("candidate_defect", "reference_defect")

    @property
    def right_op(self) -> bool:
        """Whether layer, operation and kind of pass are correct."""
        return self.found is not None and self._expected == (self.found.tap, self.found.pass_kind)

    @property
    def naming(self) -> Naming:
        """How good the name is."""
        if self.diagnosis is None or not self.diagnosis.determined:
            return "undetermined" if patterns(self.case) else "nameless"
        return "right" if is_right(self.case, self.diagnosis.name) else "wrong"

    @property
    def _expected(self) -> tuple[str, str]:
        return self.case.tap, self.case.pass_kind

    def __str__(self) -> str:
        shown = f"{self.shown.tap} in {self.shown.pass_kind}" if self.shown else "nowhere"
        found = f"{self.found.tap} in {self.found.pass_kind}" if self.found else "nothing"
        name = self.diagnosis.name if self.diagnosis else "no name"
        return f"shows {shown}, found {found}, {self.as_candidate} / {self.as_reference}, {name}"


def outcomes(
    world: World,
    families: Collection[int],
    diagnosed: Callable[[Case], bool] = lambda case: True,
    cases: Sequence[Case] = CASES,
) -> Iterator[Outcome]:
    """Run every case of these families through engine and harness; C faults first, token faults not at all:
    tokens are what the engines are given."""
    mine = [case for case in cases if case.fault.family in families and not is_about_tokens(case)]
    with world.engine_faults():
        for case in mine:
            if case.fault.how == "c":
                yield _outcome(world, case, diagnosed(case))
    for case in mine:
        if case.fault.how != "c":
            yield _outcome(world, case, diagnosed(case))


def _outcome(world: World, case: Case, diagnosed: bool) -> Outcome:
    base = case.fault.base
    faulty, healthy = world.faulty(case), world.healthy(base)
    wrong, right = audited(faulty, world.weights(base)), world.healthy_audit(base)
    diagnosis = named(faulty, wrong, world.weights(base)) if diagnosed else None
    acquitted = False
    if diagnosed and not isinstance(
        case.fault, TraceFault
    ):  # which changes what an engine recorded, and only that
        weights = world.weights(base)
        acquitted = bool(settle(replayed(faulty, weights), wrong, weights).result.misrecorded)
    shown = first_difference(healthy, faulty)
    return Outcome(case, shown, wrong.first_guilty, *_verdicts(wrong, right), diagnosis, acquitted)


def _verdicts(wrong: AuditResult, right: AuditResult) -> tuple[Verdict, Verdict]:
    return arbitrate("differ", wrong.verdict, right.verdict), arbitrate("differ", right.verdict, wrong.verdict)
