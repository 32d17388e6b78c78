"""What projections multiply that were judged together with what is around them: whole audits, each as if another.

``products.Votes`` counts projections that were judged by themselves. A coarse recording has none, or few: whole
layers lie between its tensors. Where most projections lie in what an audit does not find right, the audit is made
again for every choice that the engine leaves open, and the same rule decides: at least ``LEAST_EXPLAINED`` of the
projections are in checks that were not right and are right then. Right is ``ok``: within a bound that is at
rounding level. A mistake in one layer of four leaves too few of them; no other choice explains a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from crossval.audit.checks import AuditResult, OpCheck
from crossval.audit.products import Choice, Products, choices, deviations_of, is_enough
from crossval.capture import Place
from crossval.model import taps
from crossval.model.kinds import BitLinear
from crossval.passes import Numerics

NOT_RIGHT = ("guilty", "within")
"""The states of a check that another choice may explain."""
Hopeless = Callable[[OpCheck], bool]
"""Told every check of an audit as it is made: whether the audit can no longer explain enough."""
Again = Callable[[Choice, Hopeless], AuditResult | None]
"""The same audit with another choice; None when it was given up."""


def search(result: AuditResult, judged_by: Numerics, again: Again) -> AuditResult | None:
    """Return the audit under the choice that explains a result; None: none does, or nothing asks for it.

    ``judged_by``: what the result was judged by. The first choice in their order wins: what deviates least.
    """
    if result.verdict != "guilty" or result.products is not None:
        return None
    if not any(_not_right(check) and check.n_ops > 1 for check in result.checks):
        return None  # all were judged by themselves: counted already
    held = _by_projection(result)
    if not is_enough(sum(any(map(_not_right, checks)) for checks in held.values()), len(held)):
        return None
    for choice in choices(judged_by):
        other = again(choice, _hopeless(held))
        if other is None:
            continue
        right = {check.place for check in other.checks if check.status == "ok"}
        n = sum(_explained(checks, right) for checks in held.values())
        if is_enough(n, len(held)):
            found = Products(*choice, False, len(held), n, deviations_of(choice, judged_by))
            return replace(other, precision=result.precision, products=found)
    return None


def _hopeless(held: Mapping[Place, Sequence[OpCheck]]) -> Hopeless:
    """Return what gives an audit up once too many projections are in checks that stay wrong."""
    members: dict[Place, set[Place]] = {}
    for projection, checks in held.items():
        for check in checks:
            if _not_right(check):
                members.setdefault(check.place, set()).add(projection)
    lost: set[Place] = set()

    def hopeless(check: OpCheck) -> bool:
        if check.status != "ok":
            lost.update(members.get(check.place, ()))
        return not is_enough(len(held) - len(lost), len(held))

    return hopeless


def _by_projection(result: AuditResult) -> dict[Place, list[OpCheck]]:
    """Return the checks that each projection of each pass was judged in."""
    held: dict[Place, list[OpCheck]] = {}
    for check in result.checks:
        if check.status in ("ok", *NOT_RIGHT):
            for place in _projections(check):
                held.setdefault(place, []).append(check)
    return held


def _projections(check: OpCheck) -> Iterator[Place]:
    for name in (check.tap, *check.spans):
        if isinstance(taps.op_of(name).kind, BitLinear):
            yield check.pass_index, name


def _not_right(check: OpCheck) -> bool:
    return check.status in NOT_RIGHT


def _explained(checks: list[OpCheck], right: set[Place]) -> bool:
    wrong = [check for check in checks if _not_right(check)]
    return bool(wrong) and all(check.place in right for check in wrong)
