"""A diagnosis: a name, and the known bugs that explain the values equally well; or ``undetermined``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crossval.diagnose.variants import Candidate

UNDETERMINED = "undetermined"


@dataclass(frozen=True)
class Explanation:
    """A variant that fits."""

    name: str
    group: str = field(compare=False)
    """A sentence; it may state what is seen in one pass."""
    family: int
    sentence: str


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with an operation, or that this is undetermined."""

    name: str
    """Of the variant; of the group, when several of one group fit; or ``undetermined``."""
    family: int | None
    explanation: str
    """One sentence."""
    ratio: float | None
    """Distance of the best variant from the recorded output, relative L2 over its tokens; None: none applied."""
    runner_up: str | None
    """Next variant that gives another output."""
    runner_up_ratio: float | None
    specification_ratio: float
    """Distance of the specification from the recorded output."""
    candidates: tuple[Explanation, ...] = ()
    """All variants that fit and cannot be told apart on this input."""
    replays: tuple[Candidate, ...] = field(default=(), compare=False, repr=False)
    """The same variants as formulas, to be tried on other passes."""
    segment_ops: tuple[str, ...] = ()
    """Of a segment: full names of the operations inside it that are wrong."""

    @property
    def determined(self) -> bool:
        """Whether a cause was identified."""
        return self.name != UNDETERMINED


def combine(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """Join the diagnoses of the same operation in several passes: one cause has to explain all of them.

    Raises:
        ValueError: there are none.
    """
    if not diagnoses:
        raise ValueError("there is no diagnosis to combine")
    shared = [e for e in diagnoses[0].candidates if all(e in other.candidates for other in diagnoses[1:])]
    worst = max(diagnoses, key=lambda d: d.specification_ratio)
    if not shared:
        if len(diagnoses) == 1 or all(d.name == diagnoses[0].name for d in diagnoses):
            return replace(worst, explanation=diagnoses[0].explanation)  # of the first wrong pass
        why = "no one variant explains all passes: " + "; ".join(dict.fromkeys(d.explanation for d in diagnoses))
        return replace(worst, name=UNDETERMINED, family=None, explanation=why, candidates=(), replays=())
    name, family, sentence = verdict(shared)
    replays = tuple(one for one in diagnoses[0].replays if explanation_of(one) in shared)
    return replace(
        worst, name=name, family=family, explanation=sentence, candidates=tuple(shared), replays=replays
    )


def joined(joint: Diagnosis, fitting: Sequence[Candidate]) -> Diagnosis:
    """Return a diagnosis with other candidates; unchanged when there are none."""
    explained = list(dict.fromkeys(map(explanation_of, fitting)))
    if not explained:
        return joint
    name, family, sentence = verdict(explained)
    return replace(
        joint,
        name=name,
        family=family,
        explanation=sentence,
        candidates=tuple(explained),
        replays=tuple(fitting),
    )


def verdict(explained: Sequence[Explanation]) -> tuple[str, int | None, str]:
    """Return name, family and sentence for variants that all fit."""
    first = explained[0]
    if len(explained) == 1:
        return first.name, first.family, first.sentence
    names = [e.name for e in explained]
    either = f"{', '.join(names[:-1])} or {names[-1]}: not distinguishable on this input"
    families = {e.family for e in explained}
    family = first.family if len(families) == 1 else None
    return (first.group if len({e.group for e in explained}) == 1 else UNDETERMINED), family, either


def explanation_of(one: Candidate) -> Explanation:
    """Return the explanation by a candidate that fits."""
    return Explanation(one.name, one.group, one.variant.family, one.explanation)


def finite(x: float) -> float:
    """Return a number that JSON can hold: infinity becomes the largest float32."""
    return x if np.isfinite(x) else float(np.finfo(np.float32).max)
