"""The audit of one engine: one check per recorded tensor, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from crossval.audit import bounds
from crossval.audit.precision import Precision
from crossval.audit.products import Products
from crossval.capture import Place
from crossval.model import taps
from crossval.passes import PassKind

CheckStatus = Literal["ok", "within", "guilty", "invalid", "unchecked"]
"""``within``: a segment that agrees up to a distance at which int8 rounding ties and small errors look alike;
``invalid``: NaN, infinity or a wrong shape; ``unchecked``: an input or the output was not recorded."""
WRONG: tuple[CheckStatus, ...] = ("guilty", "invalid")
"""The states of a wrong operation."""
AuditVerdict = Literal["clean", "within", "guilty", "incomplete"]

MIN_SUMS, MOST_SUMS = 6, 0.9
"""How many additions and products, and which fraction, have to be off before their inputs are not believed."""


@dataclass(frozen=True)
class Worst:
    """The element of a tensor with the largest residual relative to its bound."""

    token: int
    """Position of the token in the sequence."""
    index: tuple[int, ...]
    """Index within the token: ``(feature,)``, ``(head, feature)``, or for attention scores ``(head, key)``."""
    recorded: float
    expected: float
    bound: float
    """Largest difference between the two that correct arithmetic allows."""


@dataclass(frozen=True)
class OpCheck:
    """One operation of one pass: the recorded output against the specification of the recorded inputs."""

    pass_index: int
    pass_kind: PassKind
    tap: str
    """Full name of the output tap."""
    status: CheckStatus
    ratio: float | None
    """Largest ``|recorded - expected| / bound``; at most 1 is ``ok``. None when nothing could be computed."""
    n_elements: int
    n_beyond: int
    """Elements (of a segment: tokens) outside their bound."""
    n_ops: int = 1
    """Operations between the recorded inputs and the output: 1, or more for a segment."""
    flips: int = 0
    """Int8 activations on the other side of a rounding tie that explain a BitLinear's integers exactly."""
    worst: Worst | None = None
    reading: str | None = None
    """Which allowed rounding of its inputs fits best, where there is a choice."""
    note: str | None = None
    explained: bool = False
    """Whether the note says why it is wrong: something is too large for the engine's format."""
    within: float | None = None
    """Of a segment that is ``within``: largest relative L2 distance of a token that could not be explained."""
    n_within: int = 0
    """How many tokens that are."""
    n_nonfinite: int = 0
    """Elements that are NaN or infinite; with any, the check is ``invalid``."""
    spans: tuple[str, ...] = ()
    """Of a segment: full names of the taps that were computed because they were not recorded."""

    @property
    def wrong(self) -> bool:
        """Whether it is outside its bound, or cannot be judged because of what was recorded."""
        return self.status in WRONG

    @property
    def place(self) -> Place:
        """Index of the pass and full name of the tap."""
        return self.pass_index, self.tap


@dataclass(frozen=True)
class Misrecorded:
    """What was recorded incorrectly: everything else passes when it is treated as missing."""

    kind: Literal["tap", "tokens", "order"]
    """An array; the arrays of other tokens than stated; passes in another order."""
    taps: tuple[str, ...]
    """Full names, in execution order."""
    passes: tuple[int, ...]
    explanation: str
    """How that is known, and what the arrays really contain where that can be told."""
    remedy: str


@dataclass(frozen=True)
class AuditResult:
    """The audit of one engine. ``checks`` are in execution order: by pass, then by operation."""

    engine: str
    checks: tuple[OpCheck, ...]
    n_ops: int
    """Operations the passes consist of, each counted once per pass."""
    n_covered: int
    """Of these, how many lie between recorded tensors and so were judged, alone or within a segment."""
    first_guilty: OpCheck | None
    verdict: AuditVerdict
    misrecorded: tuple[Misrecorded, ...] = ()
    """Recording errors: what they concern is not among the checks."""
    precision: Precision | None = None
    """The 16-bit format the engine computes in, or some of its tensors are in."""
    products: Products | None = None
    """What its projections multiply, where that is not what the model defines."""


def decide(checks: Sequence[OpCheck], n_ops: int, n_covered: int) -> AuditVerdict:
    """Return the verdict that follows from the checks."""
    states = [check.status if check.wrong or check.n_elements > 0 else "unchecked" for check in checks]
    return verdict_of_states(states, n_ops, n_covered)


def verdict_of_states(states: Collection[CheckStatus], n_ops: int, n_covered: int) -> AuditVerdict:
    """Return the verdict of an audit that judged ``n_covered`` of ``n_ops`` operations.

    One wrong operation decides; a missing one leaves the verdict open; agreement within a distance proves less.
    """
    if any(state in WRONG for state in states):
        return "guilty"
    if not states or "unchecked" in states or n_covered != n_ops or n_ops <= 0:
        return "incomplete"
    return "within" if "within" in states else "clean"


def unless_misrecorded(verdict: AuditVerdict, n_misrecorded: int) -> AuditVerdict:
    """Return the verdict of an audit; where a part of the recording is wrong, that part was not judged."""
    return "incomplete" if n_misrecorded and verdict != "guilty" else verdict


def first_guilty(checks: Iterable[OpCheck]) -> OpCheck | None:
    """Return the wrong check that was executed first: earliest pass, then earliest operation."""
    return min((check for check in checks if check.wrong), key=lambda check: in_order(check.place), default=None)


def in_order(place: Place) -> tuple[int, int]:
    """Return a key that sorts outputs by pass, then by execution."""
    return place[0], taps.execution_index(place[1])


def only_recorded(found: Precision, checks: Iterable[OpCheck]) -> bool:
    """Return whether an engine judged at a format it does not state has more digits than it recorded.

    One rounding of an exact result of recorded values is all that an addition or a product may be off. Where
    almost none keeps to that, in any layer, it is not these that are wrong: they had other inputs than were
    recorded.
    """
    if found.scope != "all" or found.declared:
        return False
    single = [c for c in checks if c.n_ops == 1 and bounds.is_one_rounding(taps.op_of(c.tap))]
    off = [c for c in single if c.status == "guilty"]
    return len(single) >= MIN_SUMS and len(off) >= MOST_SUMS * len(single)
