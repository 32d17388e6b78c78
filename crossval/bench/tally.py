"""The values of one measure, collected round by round, and the results compared as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.bench.figures import Taken
from crossval.bench.measures import Measure, Sample
from crossval.compare.rows import Skip, compare_tap
from crossval.model.tolerance import PolicyName, tolerance_for
from crossval.passes import PassPlan, TapArray
from crossval.terms import LOGITS, SIDES, Side

_ONE_TOKEN = PassPlan("decode", (0,), 1)


class Tally:
    """Collects the values of one measure of one pair.

    ``policy``: whether equal bits are required; ``n_layers``: of the model, from which bounds follow.
    """

    def __init__(self, measure: Measure, policy: PolicyName, n_layers: int) -> None:
        self._compares = measure.logits or policy == "same"
        self._policy, self._n_layers = policy, n_layers
        self._raw: dict[Side, list[float]] = {side: [] for side in SIDES}
        self._n_compared = self._n_equal = self._n_within = 0
        self._reads: Counter[str] = Counter()

    def add(self, samples: Mapping[Side, Sample], *, counted: bool) -> None:
        """Add one value of each engine; results are also compared in the warm-up."""
        if self._compares:
            for candidate, reference in zip(*(samples[side].outputs for side in SIDES), strict=False):
                self._compare(candidate, reference)
        if not counted:
            return
        self._reads.update(samples["candidate"].reads)
        for side, sample in samples.items():
            if sample.raw is not None and sample.raw > 0:
                self._raw[side].append(sample.raw)

    def _compare(self, candidate: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
        self._n_compared += 1
        if same(candidate, reference):
            self._n_equal += 1
        elif self._policy != "same":
            tolerance = tolerance_for(LOGITS, self._n_layers, self._policy)
            row = compare_tap(LOGITS, 0, _ONE_TOKEN, TapArray(candidate), TapArray(reference), tolerance)
            self._n_within += not isinstance(row, Skip) and row.status == "within"

    def taken(self) -> Taken:
        """Return everything collected."""
        raw = {side: tuple(values) for side, values in self._raw.items()}
        return Taken(raw, self._n_compared, self._n_equal, dict(self._reads), self._n_within)


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Return whether two results are finite and bit-identical."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes() and bool(np.isfinite(a).all())
