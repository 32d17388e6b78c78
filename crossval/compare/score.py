"""Two engines over the tokens of a text, teacher-forced: do the logits that predict each have equal bits?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.score import Window, negative_log_likelihood, perplexity
from crossval.compare.rows import choose_policy
from crossval.errors import UnavailableError
from crossval.passes import EngineIdentity, Runner
from crossval.terms import LOGITS, SIDES, Progress, Side


@dataclass(frozen=True)
class FirstDifference:
    """The first scored token whose logits differ."""

    position: int
    """Among the scored tokens."""
    token_id: int
    n_different: int
    """Logits that differ in their bits."""
    vocab_size: int
    largest_difference: float
    """Of two logits, absolute."""
    nll: Mapping[Side, float]


@dataclass(frozen=True)
class ScoreComparison:
    """What two engines make of a text, token by token."""

    engines: Mapping[Side, EngineIdentity]
    nll: Mapping[Side, npt.NDArray[np.float64]]
    """Negative log likelihood of every scored token, in nats, ``(n_scored,)``."""
    n_equal_logits: int
    """Scored tokens whose logits are equal in every bit."""
    n_equal_nll: int
    first_difference: FirstDifference | None
    n_bytes: int
    n_windows: int
    n_context: int
    tokenizers_agree: bool
    """Whether both read the text as the same tokens; the reference's were fed to both."""
    notes: tuple[str, ...] = ()

    @property
    def n_scored(self) -> int:
        """Scored tokens."""
        return int(self.nll["reference"].size)

    @property
    def equal(self) -> bool:
        """Whether the logits of every scored token are equal in every bit, and no tokenizer disagrees."""
        return 0 < self.n_scored == self.n_equal_logits and self.tokenizers_agree

    @property
    def same_arithmetic(self) -> bool:
        """Whether both engines state the same arithmetic, so that correct ones have equal bits."""
        return choose_policy(self.engines["candidate"], self.engines["reference"], ()) == "same"

    def figures(self, side: Side) -> dict[str, float | None]:
        """Return a side's mean negative log likelihood, perplexity (None: beyond binary64) and bits per byte."""
        total = math.fsum(self.nll[side])
        value = perplexity(total / self.n_scored)
        return {
            "mean_nll": total / self.n_scored,
            "perplexity": value if math.isfinite(value) else None,
            "bits_per_byte": total / math.log(2) / self.n_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        first = self.first_difference
        return {
            "equal": self.equal,
            "same_arithmetic": self.same_arithmetic,
            "n_scored": self.n_scored,
            "n_equal_logits": self.n_equal_logits,
            "n_equal_nll": self.n_equal_nll,
            "n_bytes": self.n_bytes,
            "n_windows": self.n_windows,
            "n_context": self.n_context,
            "tokenizers_agree": self.tokenizers_agree,
            "first_difference": None if first is None else {**vars(first), "nll": dict(first.nll)},
            **{
                str(side): {
                    **self.figures(side),
                    "engine": self.engines[side].to_json(),
                    "nll": self.nll[side].tolist(),
                }
                for side in SIDES
            },
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Scored:
    """The part of a comparison that comes from running both engines."""

    nll: Mapping[Side, npt.NDArray[np.float64]]
    n_equal_logits: int
    n_equal_nll: int
    first_difference: FirstDifference | None


def compare_scores(runners: Mapping[Side, Runner], windows: Sequence[Window], progress: Progress) -> Scored:
    """Feed both engines every window token by token, and compare the logits that predict each scored token.

    One token per pass, because engines give the logits of a pass's last token only.

    Raises:
        UnavailableError: an engine gave no logits.
        BadInputError, EngineCrashError: from the runners.
        ModelError: a logit is not finite.
    """
    total = sum(len(window.scored) for window in windows)
    nll: dict[Side, list[float]] = {side: [] for side in SIDES}
    n_equal, first = 0, None
    for window in windows:
        for runner in runners.values():
            runner.reset()
        for token, target in zip(window.inputs, window.scored, strict=True):
            position = len(nll["reference"])
            progress("scoring", position, total)
            logits = {side: _logits(runner, token) for side, runner in runners.items()}
            for side, row in logits.items():
                nll[side].append(negative_log_likelihood(row, target))
            differ = logits["candidate"].view(np.uint32) != logits["reference"].view(np.uint32)
            if not differ.any():
                n_equal += 1
            elif first is None:
                apart = np.abs(logits["candidate"].astype(np.float64) - logits["reference"])
                first = FirstDifference(
                    position,
                    target,
                    int(differ.sum()),
                    int(differ.size),
                    float(apart.max()),
                    {side: nll[side][-1] for side in SIDES},
                )
    progress("scoring", total, total)
    arrays = {side: np.array(values) for side, values in nll.items()}
    n_equal_nll = int((arrays["candidate"] == arrays["reference"]).sum())
    return Scored(arrays, n_equal, n_equal_nll, first)


def _logits(runner: Runner, token: int) -> npt.NDArray[np.float32]:
    given = runner.eval([token], {LOGITS}).taps.get(LOGITS)
    if given is None:
        raise UnavailableError(f"{runner.identity.name} gave no logits")
    return np.ascontiguousarray(given.array[-1], np.float32)
