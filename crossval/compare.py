"""Results of comparing two engines, and the one function that turns them into a verdict.

A verdict is a pure function of rows and coverage: ``decide`` re-judges every row from its own numbers and bounds,
so that a receipt's status strings need not be believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from crossval import taps
from crossval.runners.base import PassKind, PassPlan
from crossval.tolerance import violations

RowStatus = Literal["equal", "within", "diverged", "invalid"]
Verdict = Literal["parity", "divergence", "incomplete"]

_ORDER_LAYERS = 1 << 20
"""More layers than any model: ``execution_index`` only needs a consistent number to sort by."""


@dataclass(frozen=True)
class TapRow:
    """One tap of one pass, candidate against reference. Metrics are None where they are undefined.

    ``floor``: NMSE that the reference family shows against itself at this depth (``crossval.tolerance``).
    ``bound``: metric name -> threshold the row was held to (``crossval.tolerance.DIRECTIONS`` says which way).
    """

    pass_index: int
    pass_kind: PassKind
    tap: str
    rows_compared: int
    """Tokens compared: those that both engines give."""
    n_elements: int
    bitwise_equal: bool
    exact_match_rate: float | None
    """Share of elements whose float32 bits are equal (+0 and -0 differ)."""
    max_ulp: int | None
    """Largest distance in units in the last place (+0 and -0 are 0 apart)."""
    cosine: float | None
    worst_token_cosine: float | None
    worst_token: int | None
    """Position, in the sequence, of the token with the largest NMSE; None when all bits are equal."""
    nmse: float | None
    """``|c - r|^2 / |r|^2``."""
    worst_token_nmse: float | None
    max_abs: float | None
    norm_ratio: float | None
    """``|c| / |r|``."""
    floor: float | None
    bound: Mapping[str, float]
    status: RowStatus
    note: str | None = None


@dataclass(frozen=True)
class Skip:
    """A required comparison that did not take place."""

    pass_index: int
    tap: str
    why: str


@dataclass(frozen=True)
class Coverage:
    """How many (pass, tap) comparisons were required and made, and why the others were not."""

    required: int
    compared: int
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Location:
    """Where something is first seen; ``row`` is the worst token's position in the sequence, if known."""

    pass_index: int
    pass_kind: PassKind
    tap: str
    row: int | None
    note: str | None = None

    @property
    def layer(self) -> int | None:
        """Layer of the tap, None for the embedding, final norm and logits."""
        return taps.parse(self.tap).layer


@dataclass(frozen=True)
class LayersResult:
    """Outcome of ``crossval layers`` and ``crossval diff``. Rows are sorted by pass, then execution order."""

    rows: tuple[TapRow, ...]
    first_divergence: Location | None
    first_inexact: Location | None
    coverage: Coverage
    verdict: Verdict
    plan: tuple[PassPlan, ...]
    token_ids: tuple[int, ...]
    """Prompt token ids followed by the decoded tokens that both engines were fed."""
    thresholds: Mapping[str, Any]
    """``crossval.tolerance.describe(policy)``: what every row was held to, as plain JSON values."""
    n_layers: int = 0
    mode: Literal["outline", "full"] = "outline"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GreedyStep:
    """One generated token. Both engines saw the same context: the prompt and the reference's earlier tokens."""

    step: int
    candidate_token: int | None
    """Its argmax, lowest id on ties; None when its logits are not finite."""
    reference_token: int | None
    forced: bool
    """True when the candidate's own choice differed at an earlier step, so its context is not its own."""
    logits: TapRow
    """``result_output`` of this step, candidate against reference."""
    candidate_margin: float | None
    """Candidate's largest minus second largest logit."""
    reference_margin: float | None
    near_tie: bool | None = None
    """Where the tokens differ: True when the logits agree within their bounds, so that only the choice flipped."""
    explanation: str | None = None


@dataclass(frozen=True)
class GreedyPrompt:
    """Greedy decoding of one prompt."""

    prompt_ids: tuple[int, ...]
    steps_required: int
    steps: tuple[GreedyStep, ...]
    """Teacher-forced; identical to free-running as long as the tokens agree."""
    candidate_tokens: tuple[int, ...]
    """Free-running: what the candidate generates by itself."""
    reference_tokens: tuple[int, ...]
    free_running_matches: int
    """Positions at which the free-running sequences hold the same token."""
    first_divergence: int | None
    """First step at which the tokens differ, None when they never do."""
    teacher_forced_agreement: float | None
    """Share of the steps at which both engines choose the same token in the same context."""
    text: str | None = None
    why_incomplete: str | None = None


@dataclass(frozen=True)
class GreedyResult:
    """Outcome of ``crossval greedy`` over one or more prompts."""

    prompts: tuple[GreedyPrompt, ...]
    exact_match_rate: float
    """Free-running matches over all required steps of all prompts."""
    verdict: Verdict
    thresholds: Mapping[str, Any] = field(default_factory=dict)


def row_status(row: TapRow) -> RowStatus:
    """Judge a row from its numbers and bounds alone; ``row.status`` is not read."""
    if row.n_elements <= 0 or row.rows_compared <= 0 or row.max_abs is None or row.exact_match_rate is None:
        return "invalid"
    all_bits = row.exact_match_rate == 1.0
    if row.bitwise_equal != all_bits or (all_bits and (row.max_abs != 0.0 or row.max_ulp != 0)):
        return "invalid"
    if all_bits:
        return "equal"
    if row.max_abs == 0.0:
        return "within"  # signed zeros only: no value differs
    return "diverged" if violations(row, row.bound) else "within"


def execution_key(row: TapRow) -> tuple[int, int]:
    """Return the sort key of a row: pass, then position in execution order."""
    return row.pass_index, taps.execution_index(row.tap, _ORDER_LAYERS)


def first_divergence(rows: Iterable[TapRow]) -> Location | None:
    """Return the first row, in execution order, that is diverged or invalid."""
    return _first(rows, ("diverged", "invalid"))


def first_inexact(rows: Iterable[TapRow]) -> Location | None:
    """Return the first row, in execution order, whose bits are not all equal."""
    return _first(rows, ("within", "diverged", "invalid"))


def _first(rows: Iterable[TapRow], states: tuple[RowStatus, ...]) -> Location | None:
    found = min((row for row in rows if row_status(row) in states), key=execution_key, default=None)
    if found is None:
        return None
    return Location(found.pass_index, found.pass_kind, found.tap, found.worst_token, found.note)


def decide(rows: Sequence[TapRow], coverage: Coverage) -> Verdict:
    """Return the verdict of a layer comparison.

    Any diverged or invalid row (NaN, shape mismatch) is a divergence. Otherwise anything required that was not
    compared, a repeated row, or nothing compared at all makes it incomplete. Only the rest is parity.
    """
    if any(row_status(row) in ("diverged", "invalid") for row in rows):
        return "divergence"
    keys = {(row.pass_index, row.tap) for row in rows}
    complete = 0 < coverage.required == coverage.compared == len(keys) == len(rows) and not coverage.skipped
    return "parity" if complete else "incomplete"


def decide_greedy(prompts: Sequence[GreedyPrompt]) -> Verdict:
    """Return the verdict of a greedy comparison.

    A different token, or logits that are diverged or invalid, is a divergence (a near tie is explained, not
    forgiven). Fewer steps than required, or no prompt at all, is incomplete.
    """
    for prompt in prompts:
        tokens_differ = any(step.candidate_token != step.reference_token for step in prompt.steps)
        own_differ = prompt.candidate_tokens[: len(prompt.steps)] != prompt.reference_tokens[: len(prompt.steps)]
        if tokens_differ or own_differ:
            return "divergence"
        if any(row_status(step.logits) in ("diverged", "invalid") for step in prompt.steps):
            return "divergence"
    complete = bool(prompts) and all(0 < p.steps_required == len(p.steps) for p in prompts)
    complete = complete and all(p.steps_required == len(p.reference_tokens) for p in prompts)
    return "parity" if complete else "incomplete"


def exact_match_rate(prompts: Sequence[GreedyPrompt]) -> float:
    """Return free-running matches over required steps; 0.0 when nothing was required."""
    required = sum(prompt.steps_required for prompt in prompts)
    matches = sum(
        sum(c == r for c, r in zip(p.candidate_tokens, p.reference_tokens, strict=False)) for p in prompts
    )
    return matches / required if required else 0.0
