"""Diagnosis of a segment: several operations were checked as one; which of them is wrong, and how?

Each known mistake of each operation inside the segment is made one at a time, the other operations are
computed correctly, and the end of the segment is compared with what was recorded. A mistake may be in one
operation, in all that share their code (both rotations, every BitLinear, every norm), in one layer or in all of
the segment.

How values inside were rounded is unknown, so activations near an int8 tie may round either way. A mistake fits
when most tokens are at the level of float32 rounding and each of the others has such a tie and is off by no more
than ties explain; it is named when the specification and every mistake with another output are ten times farther
from the tokens that fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from crossval.audit import extent
from crossval.audit.bounds import Arithmetic, floats, readings
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis, Explanation, finite, verdict
from crossval.diagnose.hypotheses import SAME, Hypothesis, hypotheses
from crossval.diagnose.replay import Mode, Replay
from crossval.diagnose.residuals import FAILED, Trial, residuals
from crossval.diagnose.variants.context import Quantizer, quantizer_of
from crossval.diagnose.variants.distance import LINEAR_FLOOR, TABLE_FLOOR
from crossval.diagnose.variants.weights import matrix_shape
from crossval.model import taps
from crossval.model.kinds import BitLinear, FloatArray, Head
from crossval.model.op import Op

BoolArray = npt.NDArray[np.bool_]

GAP = 10.0
"""By which factor the specification and every other mistake must be farther away."""
FLIPPED = 0.05
"""Maximum relative L2 by which int8 values rounded the other way at a tie move a token."""
MOST = 2 / 3
"""Fraction of the tokens that have to be at rounding level."""
TELLING = 0.25
"""Fraction of the fitting tokens that have to exclude another explanation, where flips could also do so."""
ROUGH = 0.05
"""A mistake farther than this from the tokens checked first is not checked again."""
N_PROBE = 4
"""Number of tokens checked first."""
MOST_WORK = 5 * 10**10
"""Maximum of weights multiplied in all trials (minutes): one layer of a model of 2 billion weights."""
N_RUNNERS_UP = 3
"""Mistakes checked again in any case: the best of them is the runner-up."""
N_CLOSE = 40
"""Number of mistakes computed for every token and every way of rounding."""


@dataclass(frozen=True, eq=False)
class _Fit:
    """A hypothesis compared with the recorded tensor."""

    hypothesis: Hypothesis | None
    """None: the specification."""
    mode: Mode
    residual: FloatArray
    """Relative L2 of every token."""
    level: float
    """Distance that rounding alone may cause."""

    @property
    def one(self) -> Hypothesis:
        """The hypothesis of a fit that is not the specification's."""
        assert self.hypothesis is not None
        return self.hypothesis

    @property
    def fitting(self) -> BoolArray:
        """Which tokens are at rounding level."""
        return self.residual <= self.level

    def distance(self, tokens: BoolArray) -> float:
        """Return the distance over some tokens."""
        return float(np.sqrt(np.mean(self.residual[tokens] ** 2)))


def diagnose_segment(replays: Sequence[Replay], arithmetic: Arithmetic) -> Diagnosis:
    """Find the mistake inside a segment that explains its end in all given passes.

    ``replays``: of the same tensor in the wrong passes, the first of them first.

    Raises:
        Inapplicable: the segment cannot be computed.
    """
    search = _Search(replays, arithmetic)
    return (
        search.decide(search.close(deferred=False)) or search.decide(search.close(deferred=True)) or search.none()
    )


def remedy(names: Iterable[str]) -> str:
    """Return what to record so that each operation of a segment is checked by itself; ``names``: their taps."""
    layers = sorted({layer for name in names if (layer := taps.parse(name).layer) is not None})
    of_layers = f" of {extent.numbers('layer', layers)}" if layers else ""
    return f"record every tap{of_layers} to find the cause"


class _Search:
    """One search: what is tried on the passes, and what came closest."""

    def __init__(self, replays: Sequence[Replay], arithmetic: Arithmetic) -> None:
        self._replays = replays
        self._first = replays[0]
        self._arithmetic = arithmetic
        self._wide, self._quick = _modes(self._first.segment, arithmetic)
        self._specification = self._best(None, [self._first])
        self._ranked: list[_Fit] = []

    # --- trying it --------------------------------------------------------------------------------------------

    def close(self, deferred: bool) -> list[_Fit]:
        """Return the mistakes nearest to what was recorded in the first pass, computed for all its tokens."""
        probe = _probe(self._first)
        rough: list[tuple[float, int, Hypothesis]] = []
        tried = list(hypotheses(self._first, self._quick, deferred))
        if len(tried) * self._size() > MOST_WORK:
            return []
        trials = [Trial(one.mistake, probe if len(one.mistake.at) == 1 else None) for one in tried]
        for number, found in enumerate(residuals(self._first, trials, self._quick)):
            if found is not None:
                rough.append((_second_largest(found), number, tried[number]))
        rough.sort(key=lambda item: item[:2])
        n_close = sum(distance <= ROUGH for distance, *_ in rough)
        nearest = rough[: min(max(n_close, N_RUNNERS_UP), N_CLOSE)]
        found_close = [fit for *_, one in nearest if (fit := self._best(one, [self._first])) is not None]
        self._ranked += found_close
        return found_close

    def _size(self) -> int:
        """Return how many weights one trial multiplies."""
        config = self._first.config
        matrices = [op.weights[0].split(".")[2] for op in self._first.segment if isinstance(op.kind, BitLinear)]
        heads = sum(config.vocab_size * config.dim for op in self._first.segment if isinstance(op.kind, Head))
        return heads + sum(int(np.prod(matrix_shape(config, tensor))) for tensor in matrices)

    def _best(self, one: Hypothesis | None, replays: Sequence[Replay]) -> _Fit | None:
        """Score a hypothesis under every rounding; the rounding that fits most tokens counts."""
        found = [fit for mode in self._wide if (fit := self._fit(one, mode, replays)) is not None]
        if not found:
            return None
        near = min(found, key=_order).mode
        narrow = self._fit(one, replace(near, quantizer=self._quick.quantizer, narrow=True), replays)
        return min(found if narrow is None else [narrow, *found], key=_order)

    def _fit(self, one: Hypothesis | None, mode: Mode, replays: Sequence[Replay]) -> _Fit | None:
        parts = [self._residual(replay, one, mode) for replay in replays]
        whole = [part for part in parts if part is not None]
        return _Fit(one, mode, np.concatenate(whole), self._level(one)) if len(whole) == len(parts) else None

    def _residual(self, replay: Replay, one: Hypothesis | None, mode: Mode) -> FloatArray | None:
        with np.errstate(all="ignore"):
            try:
                found = replay.run(None if one is None else one.mistake, mode)
            except FAILED:
                return None
            return None if found is None else replay.distance(found)

    def _level(self, one: Hypothesis | None) -> float:
        """Return how far rounding alone may be; ggml's activation tables count where no int8 follows."""
        if one is None or one.first[1].variant.family != 6:
            return LINEAR_FLOOR
        order = [op.output for op in self._first.segment]
        after = self._first.segment[order.index(one.first[0]) + 1 :]
        return LINEAR_FLOOR if any(isinstance(op.kind, BitLinear) for op in after) else TABLE_FLOOR

    # --- deciding ---------------------------------------------------------------------------------------------

    def decide(self, close: Sequence[_Fit]) -> Diagnosis | None:
        """Name the mistake that fits in all passes; None when none does."""
        specification = self._specification
        best = self._nearest(close, [self._first])
        if best is None or specification is None or not _apart(specification, best):
            return None
        others = [fit for fit in close if _apart(fit, best)]
        same = [fit for fit in close if not _apart(fit, best)]
        there = best.fitting
        runner_up = min(others, key=lambda fit: fit.distance(there), default=None)
        ratio = None if runner_up is None else finite(runner_up.distance(there))
        if len(self._replays) > 1:
            same = [fit for one in same if (fit := self._in_all_passes(one)) is not None]
            specification = self._best(None, self._replays)
            best = self._nearest(same, self._replays)
            if best is None or specification is None or not _apart(specification, best):
                return None
            same = [fit for fit in same if not _apart(fit, best)]
        same = _without_synonyms(same)
        name, family, sentence, explained = self._named_by(same)
        order = [op.output for op in self._first.segment]
        places = {op for fit in same for op in fit.one.mistake.at}
        return Diagnosis(
            name=name,
            family=family,
            explanation=sentence,
            ratio=best.distance(best.fitting),
            runner_up=None if runner_up is None else runner_up.one.name,
            runner_up_ratio=ratio,
            specification_ratio=finite(specification.distance(best.fitting)),
            candidates=tuple(explained),
            segment_ops=() if name == UNDETERMINED else tuple(o for o in order if o in places),
        )

    def _nearest(self, fits: Sequence[_Fit], replays: Sequence[Replay]) -> _Fit | None:
        return min((fit for fit in fits if self._fits(fit, replays)), key=_order, default=None)

    def _in_all_passes(self, fit: _Fit) -> _Fit | None:
        """Score a mistake of the first pass in all of them, made in all or in its kind of pass only."""
        one, kind = fit.one, self._first.records[-1].plan.kind
        tried = [one, replace(one, mistake=replace(one.mistake, kind=kind))]
        found = [better for each in tried if (better := self._best(each, self._replays)) is not None]
        return min(found, key=_order, default=None)

    def _named_by(self, same: Sequence[_Fit]) -> tuple[str, int | None, str, list[Explanation]]:
        """Return name, family, sentence and all explanations; one mistake in several places has one name."""
        explained = list(dict.fromkeys(self._explain(fit) for fit in same))
        first = explained[0]
        if len({one.name for one in explained}) == 1 and len(explained) > 1:
            places = list(dict.fromkeys(fit.one.place(self._first.tap) for fit in same))
            return first.name, first.family, f"{first.sentence}; or {', or '.join(places[1:])}", explained
        return (*verdict(explained), explained)

    def none(self) -> Diagnosis:
        """Return the diagnosis that nothing known explains the segment."""
        right = self._specification
        everything: BoolArray = np.ones(1 if right is None else right.residual.size, np.bool_)
        ranked = sorted(self._ranked, key=lambda f: f.distance(everything))
        segment = self._first.segment
        why = (
            f"no single known bug in the {len(segment)} operations judged as one explains it; "
            f"{remedy(op.output for op in segment)}"
        )
        return Diagnosis(
            name=UNDETERMINED,
            family=None,
            explanation=why,
            ratio=finite(ranked[0].distance(everything)) if ranked else None,
            runner_up=ranked[1].one.name if len(ranked) > 1 else None,
            runner_up_ratio=finite(ranked[1].distance(everything)) if len(ranked) > 1 else None,
            specification_ratio=0.0 if right is None else finite(right.distance(everything)),
        )

    def _fits(self, fit: _Fit, replays: Sequence[Replay]) -> bool:
        """Return whether all tokens are explained: by the mistake, and by flips where the segment has any."""
        if fit.fitting.all():
            return True
        if np.mean(fit.fitting) <= MOST or not (fit.residual[~fit.fitting] <= FLIPPED).all():
            return False
        ties = np.concatenate([_ties(replay, fit) for replay in replays])
        return bool(ties[~fit.fitting].all())

    def _explain(self, fit: _Fit) -> Explanation:
        _, one = fit.one.first
        sentence = f"{one.explanation} ({fit.one.place(self._first.tap)})"
        return Explanation(one.name, one.group, one.variant.family, sentence)


def _ties(replay: Replay, fit: _Fit) -> BoolArray:
    """Return which of the recorded tokens flips may have changed."""
    if replay.rounds_to_f16(fit.mode):
        # binary16 has a tie every 2^-11: some key or value of every token is near one
        return np.ones(len(replay.recorded_rows), np.bool_)
    mistake = None if fit.hypothesis is None else fit.hypothesis.mistake
    found: BoolArray = replay.near_ties(mistake, fit.mode)[list(replay.recorded_rows)]
    return found


def _apart(other: _Fit, best: _Fit) -> bool:
    """Return whether the recorded values distinguish another explanation from the best, flips or not."""
    fitting = best.fitting
    if not fitting.any():
        return False
    least = GAP * np.maximum(best.residual[fitting], LINEAR_FLOOR / GAP)
    there = other.residual[fitting]
    off = there >= np.maximum(least, LINEAR_FLOOR)
    if (there[off] > FLIPPED).any():
        return True
    return bool(np.count_nonzero(off) >= max(2.0, TELLING * fitting.size))


def _without_synonyms(same: Sequence[_Fit]) -> list[_Fit]:
    """Drop fits that are another fitting mistake seen from the next operation, or the same in fewer passes."""
    there = {fit.one.seen_at for fit in same}
    everywhere = {(fit.one.name, *fit.one.mistake.at) for fit in same if fit.one.mistake.kind is None}

    def is_left(one: Hypothesis) -> bool:
        if one.seen_at in SAME and SAME[one.seen_at] in there:
            return False
        return one.mistake.kind is None or (one.name, *one.mistake.at) not in everywhere

    return [fit for fit in same if is_left(fit.one)]


def _order(fit: _Fit) -> tuple[int, float]:
    """Rank fits: most tokens at rounding level, then the nearest."""
    return -int(np.count_nonzero(fit.fitting)), float(np.median(fit.residual))


def _modes(segment: Sequence[Op], arithmetic: Arithmetic) -> tuple[list[Mode], Mode]:
    """Return the places of binary16 to try, in float64, and how an engine in binary32 does the first of them."""
    choices = []
    for op in {op.name: op for op in segment}.values():
        allowed = readings(op, arithmetic, 2, 2)
        if len(allowed) > 1 or any(allowed[0].rounded):
            choices.append([(op.name, number) for number in range(len(allowed))])
    inexact: Quantizer = "none" if floats.is_float(arithmetic) else "float64"
    wide = [Mode(tuple(one), quantizer=inexact) for one in product(*choices)]
    return wide, replace(wide[0], quantizer=quantizer_of(arithmetic), narrow=True)


def _probe(replay: Replay) -> tuple[int, ...]:
    """Choose the tokens to check first: the first, the last ones, one in between."""
    rows = replay.recorded_rows
    at = {0, len(rows) // 2, max(0, len(rows) - 2), len(rows) - 1}
    return tuple(rows[i] for i in sorted(at)[:N_PROBE])


def _second_largest(residual: FloatArray) -> float:
    """Return a distance that is robust to one flipped token."""
    ordered = np.sort(residual)
    return float(ordered[-2] if ordered.size > 2 else ordered[-1])
