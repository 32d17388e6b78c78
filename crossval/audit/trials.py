"""What projections multiply, found by whole audits, each as if the engine multiplied something else.

``products.Votes`` counts projections that were judged by themselves and were wrong. That does not settle it where
a recording is coarse (whole layers lie between its tensors), nor where what the engine multiplies differs too
little to tell in many projections: a scale may round to nearly itself. Where enough projections lie in what an
audit does not find right, the audit is made again for every choice that the engine leaves open. Projections that
are right either way tell nothing. Of those that tell, at least ``LEAST_EXPLAINED`` have to be in checks that were
not right and are right then, and so have to be that many of the layers. Right is ``ok``: within a bound that is at
rounding level. A mistake in one layer of four is in too few layers; no other choice explains a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from crossval.audit.checks import AuditResult, OpCheck
from crossval.audit.products import LEAST_EXPLAINED, Choice, Products, choices, deviations_of, is_enough
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

    ``judged_by``: what the result was judged by. The first choice in their order is named, what deviates least,
    and beside it those that explain as much without it.
    """
    if result.verdict != "guilty" or result.products is not None:
        return None
    held = _by_projection(result)
    wrong = {place for place, checks in held.items() if any(map(_not_right, checks))}
    if not is_enough(len(wrong), len(wrong)) or not _in_most_layers(wrong, held):
        return None
    best: AuditResult | None = None
    for choice in choices(judged_by):
        named = deviations_of(choice, judged_by)
        if best is not None and best.products is not None and best.products.covers(named):
            continue
        count = _Count(held, wrong)
        other = again(choice, count.take)
        if other is None:
            continue
        not_right = count.without({check.place for check in other.checks if check.status == "ok"})
        explained, n_telling = wrong - not_right, len(wrong | not_right)
        if is_enough(len(explained), n_telling) and _in_most_layers(explained, held):
            if best is None or best.products is None:
                found = Products(*choice, False, n_telling, len(explained), named)
                best = replace(other, precision=result.precision, products=found)
            else:
                best = replace(best, products=best.products.beside(named))
    return best


class _Count:
    """Counts the projections that another choice does not explain, while an audit under it goes on."""

    def __init__(self, held: Mapping[Place, Sequence[OpCheck]], wrong: Collection[Place]) -> None:
        self.wrong = wrong
        self.not_right: set[Place] = set()
        self.members: dict[Place, set[Place]] = {}
        """Check -> the projections that need it to be right."""
        for projection, checks in held.items():
            for check in checks:
                if projection not in wrong or _not_right(check):
                    self.members.setdefault(check.place, set()).add(projection)

    def take(self, check: OpCheck) -> bool:
        """Take in a check; return whether too few projections are left that the choice could explain."""
        if check.status != "ok":
            self.not_right |= self.members.get(check.place, set())
        n_lost = len(self.not_right.intersection(self.wrong))
        return not is_enough(len(self.wrong) - n_lost, len(self.not_right.union(self.wrong)))

    def without(self, right: Collection[Place]) -> set[Place]:
        """Return the projections that are not right when these checks are, and no others."""
        return set().union(*(members for place, members in self.members.items() if place not in right))


def _in_most_layers(places: Collection[Place], held: Collection[Place]) -> bool:
    """Return whether projections lie in as many of the layers as a property of the whole engine needs."""

    def layers(of: Collection[Place]) -> set[int | None]:
        return {taps.parse(tap).layer for _, tap in of}

    return len(layers(places)) >= LEAST_EXPLAINED * len(layers(held))


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
