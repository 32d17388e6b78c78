"""Diagnosis: why is this operation wrong? Compute it under every variant; name one only if no other fits.

A variant is accepted when its output is as close to the recorded one as float32 arithmetic allows, ten times
closer than the specification, and no other variant comes within a factor of ten. Variants that give the same
output on this input are reported together; none of them is singled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from crossval.audit.bounds import Arithmetic, floats, readings
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis, combine, explanation_of, finite, joined, verdict
from crossval.diagnose.variants import VARIANTS, Candidate, Context, candidates, fitted
from crossval.diagnose.variants.context import Array, Quantizer, quantizer_of
from crossval.diagnose.variants.distance import LARGEST_FLOOR, floor, near_ties, per_token
from crossval.diagnose.variants.partly import aparts, together
from crossval.diagnose.variants.pattern import describe
from crossval.model.kinds import FloatArray, IntArray
from crossval.passes import Numerics

UNEXPLAINED = "no known bug explains it; "
GAP = 10.0
"""By which factor the specification and every other variant must be farther away."""
FLIPPED = 0.02
"""Maximum relative distance of a token that activations rounded the other way at a tie may cause."""
ROUGH = 0.05
"""A variant at least this far from half of the tokens is wrong however the engine rounds its inputs."""
WHOLE_BELOW = 512
"""Matrix products with at most this many output features are computed completely from the start."""
N_WORST, N_SPREAD = 64, 128
"""Otherwise: how many features that deviate most, and how many spread evenly."""
DEFERRED_GROUPS = frozenset(variant.group or variant.name for variant in VARIANTS if variant.deferred)
EXACT = 1e-5
"""A variant that fits no better than this may only resemble one with a different parameter."""


@dataclass(frozen=True, eq=False)
class _Score:
    """One candidate against the recorded output."""

    candidate: Candidate | None
    residual: FloatArray
    """Relative L2 per token."""
    floor: FloatArray
    unit: float
    """Unit roundoff of the engine."""

    @cached_property
    def total(self) -> float:
        """Over all tokens."""
        return float(np.sqrt(np.mean(self.residual**2)))

    @cached_property
    def fits(self) -> bool:
        return bool((self.residual <= self.floor).all())

    def better(self, other: _Score | None) -> _Score:
        """Choose for each token the closer reading."""
        if other is None:
            return self
        closer = self.residual <= other.residual
        residual = np.where(closer, self.residual, other.residual)
        return _Score(self.candidate, residual, np.where(closer, self.floor, other.floor), self.unit)


def diagnose(context: Context, arithmetic: Arithmetic | None = None) -> Diagnosis:
    """Find the variant that explains a wrong operation.

    ``arithmetic``: how the engine states that it rounds; if not given, every allowed rounding is tried.
    """
    arithmetic = arithmetic or Arithmetic(Numerics(), context.config.n_heads)
    wrong_shape = _wrong_shape(context)
    if wrong_shape is not None:
        return Diagnosis(UNDETERMINED, None, wrong_shape, None, None, None, finite(np.inf))
    found = _whole(context, arithmetic)
    if found.candidates or not context.is_linear:
        return found
    return _in_parts(context, arithmetic, found)


def diagnose_passes(
    contexts: Sequence[Context], arithmetic: Arithmetic | None = None, *, right: Sequence[Context] = ()
) -> Diagnosis:
    """Find one cause for the same wrong operation in several passes.

    What explains one pass is replayed on the others: an error in some tokens need not show in every pass.
    ``right``: passes in which the operation is correct; of causes that explain the wrong ones equally, those that
    would show there are dropped.

    Raises:
        ValueError: there are no passes.
    """
    found = [diagnose(context, arithmetic) for context in contexts]
    joint = combine(found)
    arithmetic = arithmetic or Arithmetic(Numerics(), contexts[0].config.n_heads)
    if len(found) > 1 and not joint.candidates:
        fitting = [
            one
            for i, diagnosis in enumerate(found)
            for one in diagnosis.replays
            if all(
                _explains(one, c, d, arithmetic)
                for j, (c, d) in enumerate(zip(contexts, found, strict=True))
                if i != j
            )
        ]
        joint = joined(joint, fitting)
    for context in right:
        if len(joint.candidates) > 1:
            joint = narrowed(joint, context, arithmetic)
    return joint


def narrowed(found: Diagnosis, context: Context, arithmetic: Arithmetic) -> Diagnosis:
    """Return a diagnosis without the causes that another pass of the same operation excludes.

    A correct pass excludes causes that would show in it; a wrong pass, causes that do not explain it. If that
    would leave nothing, the pass has a cause of its own and nothing is excluded.
    """
    search = _Search.of(context, arithmetic)
    if search.specification.fits:
        return joined(found, [one for one in found.replays if _is_right(one, context, arithmetic)])
    return joined(found, [one for one in found.replays if _accepted(search.run([one]), search.specification)])


def _explains(one: Candidate, context: Context, diagnosis: Diagnosis, arithmetic: Arithmetic) -> bool:
    """Return whether a candidate explains another pass as well as the best candidate there."""
    search = _Search.of(context, arithmetic)
    best = diagnosis.ratio if diagnosis.candidates and diagnosis.ratio is not None else 0.0
    scores = _accepted(search.run([one]), search.specification)
    return any(score.total < GAP * max(best, score.unit) or not diagnosis.candidates for score in scores)


def _is_right(one: Candidate, context: Context, arithmetic: Arithmetic) -> bool:
    """Return whether a candidate changes nothing in a correct pass."""
    return all(score.fits for score in _Search.of(context, arithmetic).run([one]))


# --- one pass -------------------------------------------------------------------------------------------------


def _whole(context: Context, arithmetic: Arithmetic) -> Diagnosis:
    """Explain all tokens and features of a pass by one variant, or by one whose parameters are fitted."""
    contexts = _readings(context, arithmetic)
    sample = _sample(context)
    seen = [c.sampled(sample) for c in contexts] if sample is not None else contexts
    search = _Search(seen, arithmetic)
    far: list[_Score] = []
    tried = list(candidates(seen[0]))
    if len(seen) > 1:
        rough = _Search(seen[:1], arithmetic).run(tried)
        far = [s for s in rough if np.median(s.residual) > ROUGH]
        settled = {id(s.candidate) for s in far}
        tried = [c for c in tried if id(c) not in settled]
    scores = far + search.run(tried)
    if not _accepted(scores, search.specification) or any(_has_more(s) for s in scores if s.fits):
        scores += search.run(candidates(seen[0], deferred=True))
    best = min((s.total for s in _accepted(scores, search.specification)), default=np.inf)
    if context.is_linear and best > LARGEST_FLOOR:
        scores += search.run(fitted(seen[0]))
    elif not context.is_linear and best > EXACT:  # parameters are fitted to each reading separately
        scores += [score for one in seen for score in _Search([one], arithmetic).run(fitted(one))]
    if sample is None:
        return _decide(contexts[0], scores, search.specification)
    close = _accepted(scores, search.specification)
    if not close:
        return _decide(contexts[0], scores, search.specification)
    whole = _Search(contexts, arithmetic)
    confirmed = whole.run(s.candidate for s in close if s.candidate is not None)
    seen_whole = {id(s.candidate) for s in confirmed}
    others = [s for s in scores if id(s.candidate) not in seen_whole]
    return _decide(contexts[0], confirmed, whole.specification, others)


def _in_parts(context: Context, arithmetic: Arithmetic, found: Diagnosis, depth: int = 2) -> Diagnosis:
    """Set aside what is visibly not a result, or is correct, and explain the rest; ``found`` if that fails.

    ``depth``: how many times something may be set aside: tokens, then features of the others.
    """
    for apart in aparts(context) if depth else ():
        rest = apart.rest(context)
        search = _Search.of(rest, arithmetic)
        if search.specification.fits:
            bases: Sequence[Candidate | None] = (None,)
            ratio = search.specification.total
        else:
            inner = _whole(rest, arithmetic)
            if not inner.candidates and apart.content != "right":
                inner = _in_parts(rest, arithmetic, inner, depth - 1)
            bases, ratio = inner.replays, inner.ratio or 0.0
            if not bases and apart.content != "right":
                said = f"{found.explanation}; of the rest: {inner.explanation.removeprefix(UNEXPLAINED)}"
                found = replace(found, explanation=said)
        with np.errstate(over="ignore", invalid="ignore"):
            both = [one for one in together(apart, bases) if one.compute(context) is not None]
        if both:
            return replace(joined(found, both), ratio=ratio, runner_up=None, runner_up_ratio=None)
    return found


# --- searching ------------------------------------------------------------------------------------------------


class _Search:
    """Scores candidates on the same operation read in several ways."""

    def __init__(self, contexts: Sequence[Context], arithmetic: Arithmetic) -> None:
        self._contexts = contexts
        self._arithmetic = arithmetic
        self._forgiving = _forgiving(contexts[0], arithmetic)
        best: _Score | None = None
        for context in contexts:
            best = self._score(None, context, context.expected).better(best)
        assert best is not None
        self.specification = best

    @classmethod
    def of(cls, context: Context, arithmetic: Arithmetic) -> _Search:
        """Return a search over every way in which an engine like this may round."""
        return cls(_readings(context, arithmetic), arithmetic)

    def run(self, tried: Iterable[Candidate]) -> list[_Score]:
        """Return a score for every candidate that applies."""
        scores = []
        for candidate in tried:
            best: _Score | None = None
            for context in self._contexts:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    output = candidate.compute(context)
                if output is not None:
                    best = self._score(candidate, context, output).better(best)
            if best is not None:
                scores.append(best)
        return scores

    def _score(self, candidate: Candidate | None, context: Context, output: Array) -> _Score:
        residual = per_token(context, output)
        family = candidate.variant.family if candidate else 0
        if candidate is not None and self._forgiving is not None:
            residual = np.where(self._forgiving & (residual <= FLIPPED), 0.0, residual)
        if context.is_linear or residual.max() <= LARGEST_FLOOR:
            allowed = floor(context, output, family, self._arithmetic)
        else:
            allowed = np.zeros_like(residual)
        return _Score(candidate, residual, allowed, self._arithmetic.format.unit_roundoff)


def _forgiving(context: Context, arithmetic: Arithmetic) -> Array | None:
    """Return which tokens may hold int8 flips, if an engine does not state how it rounds; None: none.

    The other tokens have to be the majority, or there would be too little left to judge by.
    """
    if not context.is_linear or arithmetic.known or floats.is_float(arithmetic):
        return None
    near = near_ties(context.inputs[0])
    return near if near.any() and 2 * np.count_nonzero(near) < near.size else None


def _readings(context: Context, arithmetic: Arithmetic) -> list[Context]:
    """Return the operation with each way an engine like this may round before it computes."""
    if context.is_linear:
        names: tuple[Quantizer, ...] = ("float32", "fused", "float64", "divide")
        if arithmetic.known or floats.is_float(arithmetic):
            names = (quantizer_of(arithmetic),)
        return [replace(context, quantizer=name) for name in names]
    found = readings(context.op, arithmetic, context.n_tokens, context.n_rows)
    return [replace(context, rounded=reading.rounded) for reading in found]


def _wrong_shape(context: Context) -> str | None:
    """Describe what is wrong with the shape of the recorded output or of an input; None: nothing."""
    recorded = context.recorded.shape
    try:
        if context.is_flat:
            n_features = context.matrix.signs.shape[0] if context.is_linear else context.vector.shape[0]
            expected: tuple[int, ...] = (context.inputs[0].shape[0], n_features)
            recorded = (recorded[0], int(np.prod(recorded[1:])))
            context.sampled(np.arange(1)).expected  # noqa: B018  # raises where the input does not fit
        else:
            expected = context.expected.shape
    except (ValueError, IndexError):
        return f"the shapes of its inputs do not match: {', '.join(str(a.shape) for a in context.raw)}"
    return None if recorded == expected else f"expected shape {expected}, recorded {recorded}"


def _sample(context: Context) -> IntArray | None:
    """Choose the output features to check first: the worst, and some spread evenly; None: all."""
    have = np.arange(context.recorded[0].size) if context.features is None else context.features
    if not context.is_flat or have.size <= WHOLE_BELOW:
        return None
    spread = have[np.linspace(0, have.size - 1, N_SPREAD).astype(np.int64)]
    coarse = context.sampled(have[:: max(1, have.size // 2048)])
    assert coarse.features is not None
    off = np.nan_to_num(np.abs(coarse.target - coarse.expected), nan=np.inf).max(axis=0)
    worst = coarse.features[np.argsort(off)[-N_WORST:]]
    return np.unique(np.concatenate([spread, worst]))


# --- deciding -------------------------------------------------------------------------------------------------


def _accepted(scores: Iterable[_Score], specification: _Score) -> list[_Score]:
    return [s for s in scores if s.fits and GAP * max(s.total, specification.unit / 2) <= specification.total]


def _decide(
    context: Context, scores: list[_Score], specification: _Score, seen_in_part: Sequence[_Score] = ()
) -> Diagnosis:
    """Name what fits. ``seen_in_part``: did not fit the features checked first; can only be the runner-up."""
    ranked = sorted([*scores, *seen_in_part], key=lambda s: s.total)
    accepted = sorted(_accepted(scores, specification), key=lambda s: s.total)
    if not accepted:
        return _unexplained(context, ranked, specification)
    best = accepted[0]
    level = GAP * max(best.total, specification.unit)
    same = [s for s in sorted(scores, key=lambda s: s.total) if s.total < level]
    names = {_name(s) for s in same}
    others = [s for s in ranked if s.total >= level and _name(s) not in names]
    explained = list(dict.fromkeys(explanation_of(s.candidate) for s in same if s.candidate is not None))
    name, family, sentence = verdict(explained)
    return Diagnosis(
        name=name,
        family=family,
        explanation=sentence,
        ratio=best.total,
        runner_up=_name(others[0]) if others else None,
        runner_up_ratio=finite(others[0].total) if others else None,
        specification_ratio=finite(specification.total),
        candidates=tuple(explained),
        replays=tuple(s.candidate for s in same if s.candidate is not None),
    )


def _unexplained(context: Context, ranked: list[_Score], specification: _Score) -> Diagnosis:
    sentence = f"{UNEXPLAINED}{describe(context)}"
    best = ranked[0] if ranked else None
    second = ranked[1] if len(ranked) > 1 else None
    return Diagnosis(
        name=UNDETERMINED,
        family=None,
        explanation=sentence,
        ratio=finite(best.total) if best else None,
        runner_up=_name(second) if second else None,
        runner_up_ratio=finite(second.total) if second else None,
        specification_ratio=finite(specification.total),
    )


def _name(score: _Score) -> str:
    return score.candidate.name if score.candidate else "specification"


def _has_more(score: _Score) -> bool:
    """Return whether a costly variant belongs to the same group."""
    return score.candidate is not None and score.candidate.group in DEFERRED_GROUPS
