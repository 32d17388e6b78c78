"""What an engine's projections multiply, where that is not what the model defines: stated, or found from them.

The model multiplies int8 codes, one step per token, with ternary weights. An engine that multiplies the
activations themselves, or weights whose scale was rounded to 16 bits, deviates from it in every projection. That
is one property of the engine: stated, its bounds follow; not stated, it is found where one such property explains
what is wrong with most projections. It is always said, and never agreement with the model
(``crossval.examine.verdict``).

The rule for what is not stated: of the projections judged by themselves, at least ``LEAST_EXPLAINED`` are outside
the bounds of what the model defines and within those of one and the same other choice. A mistake in one layer, or
in one projection of every layer, leaves that many; a choice made in fewer places is a mistake in those places.
Where projections lie inside segments, or are right either way, ``trials`` decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import product
from typing import Any, Literal

import numpy as np

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic
from crossval.formats import BF16, F16, FORMATS
from crossval.model.kinds import TernaryMatrix, Weight
from crossval.model.op import WeightSource
from crossval.passes import Activations, Numerics, Weights
from crossval.receipts.file import Receipt
from crossval.receipts.policy import GateCheck, Policy
from crossval.terms import SIDES, Side

LEAST_EXPLAINED = Fraction(2, 3)
"""Of four layers one may be wrong, of seven projections one."""
MIN_CHECKED = 7
"""Projections that a finding needs at least."""

Choice = tuple[Activations, Weights]
Deviation = Literal["float_activations", "weights_f16", "weights_bf16"]
"""A way to deviate from the model's definition, as a policy names it."""
FLAG = "--allow-deviation"
WORDS: Mapping[str, str] = {
    "float_activations": "its activations are not quantised to int8",
    "weights_f16": "its weights are rounded to binary16 (F16)",
    "weights_bf16": "its weights are rounded to bfloat16",
}


@dataclass(frozen=True)
class Products:
    """What the projections of an engine multiply, and how many of them that explains."""

    activations: Activations
    weights: Weights
    declared: bool
    n_checked: int
    """Projections judged, by themselves or with what is around them, each counted once per pass.

    Found by ``trials``, it leaves out those that are right either way.
    """
    n_explained: int
    """Of these, how many are within the bounds of this."""
    deviations: tuple[Deviation, ...]
    """What of it the model's definition and the format that the engine computes in do not give."""
    alternatives: tuple[tuple[Deviation, ...], ...] = ()
    """What would explain them as well, without these: which of them it is was not shown."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the receipt's ``audit.*.products``."""
        data = {**asdict(self), "deviations": list(self.deviations)}
        alternatives = [list(one) for one in data.pop("alternatives")]
        return {**data, "alternatives": alternatives} if alternatives else data

    def beside(self, deviations: Sequence[Deviation]) -> Products:
        """Return it with another explanation, unless that is this one and more."""
        if self.covers(deviations):
            return self
        return replace(self, alternatives=(*self.alternatives, tuple(deviations)))

    def covers(self, deviations: Sequence[Deviation]) -> bool:
        """Return whether another explanation says this, too, whatever else it says."""
        return set(self.deviations) <= set(deviations)

    def stated_in(self, numerics: Numerics) -> Numerics:
        """Return numerics that state it; the same if they do."""
        if _chosen(numerics) == (self.activations, self.weights):
            return numerics
        return replace(numerics, activation_quantization=self.activations, weights=self.weights)


@dataclass
class Votes:
    """Projections of one engine that were judged by themselves, and what would explain the wrong ones."""

    n_checked: int = 0
    n_right: int = 0
    explained: Counter[Choice] = field(default_factory=Counter)

    def add(
        self,
        x: np.ndarray[Any, Any],
        recorded: np.ndarray[Any, Any],
        weights: list[Any],
        arithmetic: Arithmetic,
        *,
        wrong: bool,
    ) -> None:
        """Take in one projection: its recorded input and output, matrix and bias as in the file, the judgement."""
        self.n_checked += 1
        self.n_right += not wrong
        if not wrong:
            return
        few_digits = any(form.holds(recorded[:1]) for form in (BF16, F16))
        if arithmetic.low or not few_digits:  # else it is judged again, in the format that it is in
            for choice in choices(arithmetic.numerics):
                if _explains(choice, x, recorded, weights, arithmetic):
                    self.explained[choice] += 1

    def found(self, judged_by: Numerics, stated: Numerics) -> Products | None:
        """Return what the projections multiply: as judged by, or what explains most; None: what the model defines.

        The first choice in the order of ``choices`` is named, and the others that explain enough without it.
        """
        found: Products | None = None
        for choice in choices(judged_by):
            n = self.explained[choice]
            if is_enough(n, self.n_checked):
                named = deviations_of(choice, judged_by)
                found = (
                    Products(*choice, False, self.n_checked, n, named) if found is None else found.beside(named)
                )
        if found is not None:
            return found
        held = _chosen(judged_by)
        if not _deviates(*held):
            return None
        named = deviations_of(held, judged_by)
        return Products(*held, held == _chosen(stated), self.n_checked, self.n_right, named)


def is_enough(n_explained: int, n_checked: int) -> bool:
    """Return whether so many of the projections show what all of them multiply."""
    return n_checked >= MIN_CHECKED and n_explained >= LEAST_EXPLAINED * n_checked


def _chosen(numerics: Numerics) -> Choice:
    return numerics.activation_quantization or "int8", numerics.weights or "packed"


def choices(numerics: Numerics) -> list[Choice]:
    """Return what the projections of an engine may multiply otherwise than the model defines, as far as is open.

    What deviates least comes first. A statement binds: what an engine states is not looked for. One that states
    the arithmetic of bitnet.cpp's family states its int8 quantiser and packed weights with it.
    """
    if numerics.activation_quantization == "q8_k" or None not in (numerics.simd_width, numerics.fused_quantizer):
        return []
    activations: tuple[Activations, ...] = ("int8", "none")
    weights: tuple[Weights, ...] = ("packed", "bf16", "f16")
    open_ = product(
        activations if numerics.activation_quantization is None else (numerics.activation_quantization,),
        weights if numerics.weights is None else (numerics.weights,),
    )
    found = [choice for choice in open_ if _deviates(*choice) and choice != _chosen(numerics)]
    return sorted(found, key=lambda choice: len(deviations_of(choice, numerics)))


def deviations_of(choice: Choice, judged_by: Numerics) -> tuple[Deviation, ...]:
    """Return in what a choice deviates from the model's definition, as a policy names it.

    Weights that are rounded to a format that the engine computes in anyway are no deviation of their own.
    """
    activations, weights = choice
    named: tuple[Deviation, ...] = ("float_activations",) if activations == "none" else ()
    if weights not in ("packed", "f32") and weights not in judged_by.formats:
        named = (*named, "weights_f16" if weights == "f16" else "weights_bf16")
    return named


def _deviates(activations: Activations, weights: Weights) -> bool:
    return activations == "none" or weights not in ("packed", "f32")


def _explains(
    choice: Choice,
    x: np.ndarray[Any, Any],
    recorded: np.ndarray[Any, Any],
    weights: list[Any],
    arithmetic: Arithmetic,
) -> bool:
    """Return whether a projection is within the bounds of another choice."""
    stated = replace(arithmetic.numerics, activation_quantization=choice[0], weights=choice[1])
    matrix = of_statement(weights[0], stated)
    result = bounds.check_bitlinear(
        x, recorded, [matrix, *weights[1:]], replace(arithmetic, numerics=stated), arithmetic.recorded
    )
    return bool((np.abs(recorded.astype(np.float64) - result.expected) <= result.bound).all())


def of_statement(matrix: TernaryMatrix, numerics: Numerics) -> TernaryMatrix:
    """Return a matrix as an engine multiplies it that states what its weights are."""
    if numerics.weights in (None, "packed"):
        return matrix
    return matrix.dequantised(FORMATS[numerics.weights])


@dataclass(frozen=True)
class StatedWeights:
    """The weights of a model as an engine multiplies them; satisfies ``WeightSource``."""

    weights: WeightSource
    numerics: Numerics

    def __getitem__(self, name: str, /) -> Weight:
        found = self.weights[name]
        return of_statement(found, self.numerics) if isinstance(found, TernaryMatrix) else found


# --- in receipts ----------------------------------------------------------------------------------------------


def of_json(data: Mapping[str, Any] | None) -> Products | None:
    """Return the finding of a receipt that is valid by the schema."""
    if data is None:
        return None
    alternatives = tuple(map(tuple, data.get("alternatives", ())))
    return Products(**{**data, "deviations": tuple(data["deviations"]), "alternatives": alternatives})


def complaints(data: Mapping[str, Any] | None, stated: Numerics, judged_by: Numerics) -> Iterator[str]:
    """Check a finding: a stated deviation must be there, one that is not stated must follow from its counts."""
    found = of_json(data)
    if found is None:
        if _deviates(*_chosen(stated)):
            yield "the engine states that it deviates from the model, its audit does not"
        return
    choice = found.activations, found.weights
    if not _deviates(*choice):
        yield f"{choice[0]} times {choice[1]} is what the model defines"
    if found.deviations != deviations_of(choice, judged_by):
        yield f"deviations are {list(found.deviations)}, of {' times '.join(choice)}"
    if found.declared != (choice == _chosen(stated)):
        yield f"declared is {found.declared}, the engine states {' times '.join(_chosen(stated))}"
    elif not found.declared and choice not in choices(stated):
        yield "found otherwise than stated, which a statement rules out"
    open_ = [] if found.declared else [deviations_of(one, judged_by) for one in choices(stated)]
    if any(one not in open_ or found.covers(one) for one in found.alternatives):
        yield f"alternatives are {[list(one) for one in found.alternatives]}"
    if found.n_explained > found.n_checked:
        yield f"{found.n_explained} of {found.n_checked} projections"
    elif not found.declared and not is_enough(found.n_explained, found.n_checked):
        yield f"{found.n_explained} of {found.n_checked} projections do not show it"


def any_deviates(audits: Mapping[Any, Mapping[str, Any] | None]) -> bool:
    """Return whether the projections of either engine multiply something else than the model defines."""
    return any(map(deviations, audits.values()))


def deviations(audit: Mapping[str, Any] | None) -> list[Deviation]:
    """Return in what an engine of a receipt deviates from the model's definition."""
    found: list[Deviation] = ((audit or {}).get("products") or {}).get("deviations", [])
    return found


def possible(audit: Mapping[str, Any] | None) -> list[Deviation]:
    """Return every deviation that an engine of a receipt may have: which of several it has may not be shown."""
    alternatives = ((audit or {}).get("products") or {}).get("alternatives", [])
    return list(dict.fromkeys([*deviations(audit), *(one for named in alternatives for one in named)]))


def demands(side: Side, audit: Mapping[str, Any] | None, policy: Policy) -> Iterator[GateCheck]:
    """Check that the policy accepts in what an engine deviates, or may, from the model's definition."""
    named = possible(audit)
    if named:
        accepted = ", ".join(policy.allow_deviation) or "none"
        passed = set(named) <= set(policy.allow_deviation)
        yield GateCheck(f"deviation of the {side}", passed, f"{', '.join(named)}; accepted: {accepted}")


def words(receipt: Receipt) -> list[str]:
    """Return, for each engine that deviates from the model's definition, in what and how that is known."""
    audits = receipt["audit"] or {}
    found = [(side, deviations(audits.get(side))) for side in SIDES]
    return [
        f"of the {side}, {_in_words(audits[side]['products'])}, "
        f"{'as it states' if audits[side]['products']['declared'] else 'which it does not state'}"
        for side, named in found
        if named
    ]


def _in_words(found: Mapping[str, Any]) -> str:
    every = [found["deviations"], *found.get("alternatives", ())]
    return ", or ".join(" and ".join(WORDS[one] for one in named) for named in every)


def flags(receipt: Receipt) -> str:
    """Return the options of the gate that accept what the engines of a receipt deviate in."""
    audits = receipt["audit"] or {}
    named = dict.fromkeys(one for side in SIDES for one in possible(audits.get(side)))
    return " ".join(f"{FLAG} {one}" for one in named)


def sentence(found: Mapping[str, Any]) -> str:
    """Return what a receipt says of an engine's projections as a sentence."""
    what = _in_words(found) if found["deviations"] else f"its weights are in {found['weights']}"
    taken = f"{found['n_explained']} of {found['n_checked']} projections"
    if found["declared"]:
        return f"{what}, as it states; judged as such, {taken} are within their bounds"
    which = "the first of these; which of them it is was not shown" if found.get("alternatives") else "such"
    return (
        f"{what}, which it does not state: {taken} are within the bounds of that, and were outside those of int8 "
        f"codes times the file's weights; all are judged as {which}"
    )
