"""Two engines over the tokens of a text, teacher-forced: do the logits that predict each have equal bits?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.score import Window, negative_log_likelihood, perplexity
from crossval.compare.rows import choose_policy
from crossval.errors import UnavailableError
from crossval.passes import EngineIdentity, Runner
from crossval.terms import LOGITS, SIDES, PassFail, Progress, Side


@dataclass(frozen=True)
class ScoredToken:
    """One scored token, and the logits that predict it."""

    token_id: int
    n_different: int
    """Logits that differ in their bits."""
    nll: Mapping[Side, float]
    """Negative log likelihood, in nats."""


@dataclass(frozen=True)
class FirstDifference:
    """The first scored token whose logits differ."""

    position: int
    """Among the scored tokens."""
    token_id: int
    n_different: int
    largest_difference: float
    """Of two logits, absolute."""
    nll: Mapping[Side, float]


@dataclass(frozen=True)
class Scored:
    """What comes from running both engines."""

    tokens: tuple[ScoredToken, ...]
    digests: Mapping[Side, str]
    """sha256 over the logits of all scored tokens, little-endian float32."""
    first_difference: FirstDifference | None


@dataclass(frozen=True)
class Text:
    """What was scored, and how it was cut."""

    sha256: str
    n_bytes: int
    n_scored_bytes: int
    """Bytes that the scored tokens stand for."""
    n_context: int
    """Tokens of the longest window."""
    bos_id: int | None
    """What each window starts with; None: the text's token before it."""


@dataclass(frozen=True)
class ScoreResult:
    """Two engines on one text."""

    text: Text
    scored: Scored
    engines: Mapping[Side, EngineIdentity]
    tokenizers_agree: bool
    """Whether both read the text as the same tokens; the reference's were fed to both."""

    @property
    def n_scored(self) -> int:
        """Scored tokens."""
        return len(self.scored.tokens)

    @property
    def n_equal_logits(self) -> int:
        """Scored tokens whose logits are equal in every bit."""
        return sum(not token.n_different for token in self.scored.tokens)

    @property
    def n_equal_nll(self) -> int:
        """Scored tokens with equal negative log likelihoods."""
        return sum(token.nll["candidate"] == token.nll["reference"] for token in self.scored.tokens)

    @property
    def same_arithmetic(self) -> bool:
        """Whether both engines state the same arithmetic, so that correct ones have equal bits."""
        return choose_policy(self.engines["candidate"], self.engines["reference"], ()) == "same"

    @property
    def verdict(self) -> PassFail:
        """``pass``: all logits have equal bits; ``incomplete``: they have not, which shows no fault by itself."""
        if not self.tokenizers_agree:
            return "fail"
        if 0 < self.n_scored == self.n_equal_logits:
            return "pass"
        return "fail" if self.same_arithmetic and self.n_scored else "incomplete"

    def figures(self, side: Side) -> dict[str, float | None]:
        """Return a side's mean negative log likelihood, perplexity (None: beyond binary64) and bits per byte."""
        total = math.fsum(token.nll[side] for token in self.scored.tokens)
        mean = total / max(1, self.n_scored)
        value = perplexity(mean)
        return {
            "mean_nll": mean,
            "perplexity": value if math.isfinite(value) else None,
            "bits_per_byte": total / math.log(2) / max(1, self.text.n_scored_bytes),
        }


def compare_scores(runners: Mapping[Side, Runner], windows: Sequence[Window], progress: Progress) -> Scored:
    """Feed both engines every window token by token, and compare the logits that predict each scored token.

    One token per pass, because engines give the logits of a pass's last token only.

    Raises:
        UnavailableError: an engine gave no logits.
        BadInputError, EngineCrashError: from the runners.
        ModelError: a logit is not finite.
    """
    total = sum(len(window.scored) for window in windows)
    tokens: list[ScoredToken] = []
    digests = {side: hashlib.sha256() for side in SIDES}
    first = None
    for window in windows:
        for runner in runners.values():
            runner.reset()
        for token, target in zip(window.inputs, window.scored, strict=True):
            progress("scoring", len(tokens), total)
            logits = {side: _logits(runner, token) for side, runner in runners.items()}
            nll = {side: negative_log_likelihood(row, target) for side, row in logits.items()}
            for side, row in logits.items():
                digests[side].update(row.astype("<f4").tobytes())
            n_different = int((logits["candidate"].view(np.uint32) != logits["reference"].view(np.uint32)).sum())
            if n_different and first is None:
                apart = np.abs(logits["candidate"].astype(np.float64) - logits["reference"])
                first = FirstDifference(len(tokens), target, n_different, float(apart.max()), nll)
            tokens.append(ScoredToken(target, n_different, nll))
    progress("scoring", total, total)
    return Scored(tuple(tokens), {side: digest.hexdigest() for side, digest in digests.items()}, first)


def _logits(runner: Runner, token: int) -> npt.NDArray[np.float32]:
    given = runner.eval([token], {LOGITS}).taps.get(LOGITS)
    if given is None:
        raise UnavailableError(f"{runner.identity.name} gave no logits")
    return np.ascontiguousarray(given.array[-1], np.float32)
