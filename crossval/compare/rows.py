"""Results of comparing two engines, how one tap is compared, and the function that turns rows into a verdict.

A verdict is a pure function of rows and coverage: ``decide`` re-judges every row from its own numbers and bounds,
so that a receipt's status strings need not be believed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crossval.compare.metrics import Metrics, measure
from crossval.formats import Dtype
from crossval.model import taps
from crossval.model.taps import token_axis
from crossval.model.tolerance import PolicyName, Tolerance, violations
from crossval.passes import EngineIdentity, PassKind, PassPlan, TapArray, check_rows
from crossval.terms import SIDES

RowStatus = Literal["equal", "within", "diverged", "invalid"]
Parity = Literal["parity", "divergence", "incomplete"]
"""Outcome of a direct comparison: a receipt's ``parity.status``."""

_SHARED_METRICS = (
    "n_elements",
    "bitwise_equal",
    "exact_match_rate",
    "max_ulp",
    "cosine",
    "worst_token_cosine",
    "nmse",
    "worst_token_nmse",
    "max_abs",
    "norm_ratio",
)
"""Fields of ``Metrics`` that a row takes over as they are."""
MAX_TOKENS_SHOWN = 512
"""Longest pass of which each token's error is kept."""
_ORDER_LAYERS = 1 << 20
"""More layers than any model: ``execution_index`` only needs a consistent number to sort by."""


@dataclass(frozen=True)
class TapRow:
    """One tap of one pass, candidate against reference. Metrics are None where they are undefined.

    ``floor``: NMSE that the reference family shows against itself at this depth (``crossval.model.tolerance``).
    ``bound``: metric name -> threshold the row was held to (``tolerance.DIRECTIONS`` says which way).
    """

    pass_index: int
    pass_kind: PassKind
    tap: str
    rows_compared: int = 0
    """Tokens compared: those that both engines give."""
    n_elements: int = 0
    bitwise_equal: bool = False
    exact_match_rate: float | None = None
    """Share of elements whose float32 bits are equal (+0 and -0 differ)."""
    max_ulp: int | None = None
    """Largest distance in units in the last place (+0 and -0 are 0 apart)."""
    cosine: float | None = None
    worst_token_cosine: float | None = None
    worst_token: int | None = None
    """Position, in the sequence, of the token with the largest NMSE; None when all bits are equal."""
    nmse: float | None = None
    """``|c - r|^2 / |r|^2``."""
    worst_token_nmse: float | None = None
    token_nmse: tuple[float | None, ...] | None = None
    """NMSE of each token of the pass, to three digits, where the output of a layer or of the whole model differs;
    None in other rows, and in passes of one token or of more than ``MAX_TOKENS_SHOWN``. An entry is None where the
    NMSE is undefined."""
    max_abs: float | None = None
    norm_ratio: float | None = None
    """``|c| / |r|``."""
    floor: float | None = None
    bound: Mapping[str, float] = field(default_factory=dict)
    status: RowStatus = "invalid"
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
    after: str | None = None
    """The last tap before it that was compared in this pass: what is seen here entered after it."""

    @property
    def layer(self) -> int | None:
        """Layer of the tap, None for the embedding, final norm and logits."""
        return taps.parse(self.tap).layer


@dataclass(frozen=True)
class LayersResult:
    """Outcome of ``crossval layers`` and ``crossval diff``. Rows are sorted by pass, then execution order."""

    rows: tuple[TapRow, ...]
    coverage: Coverage
    plan: tuple[PassPlan, ...]
    thresholds: Mapping[str, Any]
    """``crossval.model.tolerance.describe(policy)``: what every row was held to, as plain JSON values."""
    n_layers: int = 0
    mode: Literal["outline", "full"] = "outline"
    notes: tuple[str, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt token ids followed by the decoded tokens that both engines were fed."""
        return tuple(token for one in self.plan for token in one.token_ids)

    @property
    def first_divergence(self) -> Location | None:
        """The first row that is diverged or invalid."""
        return first_divergence(self.rows)

    @property
    def first_inexact(self) -> Location | None:
        """The first row whose bits are not all equal."""
        return first_inexact(self.rows)

    @property
    def verdict(self) -> Parity:
        """Of the direct comparison; the audits are not in it."""
        return decide(self.rows, self.coverage)


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
    """Where the tokens differ: True when the logits agree within their bounds and both engines were audited and
    are correct, so that only the choice flipped; False: this was not shown."""
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
    thresholds: Mapping[str, Any]
    """``crossval.model.tolerance.describe(policy)``: what the logits were held to, as plain JSON values."""
    from_journal: int | None = None
    """How many of the prompts, the first ones, an earlier run left in a journal; None without a journal."""
    audited: tuple[PassPlan, ...] = ()
    """Passes of the first prompt in which both engines were audited."""

    @property
    def policy(self) -> PolicyName:
        """The tolerance table that the logits are held to."""
        name: PolicyName = self.thresholds["policy"]
        return name

    @property
    def exact_match_rate(self) -> float:
        """Free-running matches over all required steps of all prompts."""
        return exact_match_rate(self.prompts)

    @property
    def verdict(self) -> Parity:
        """Of the direct comparison; the audits are not in it."""
        return decide_greedy(self.prompts, self.policy)


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


def judged(row: TapRow, tolerance: Tolerance) -> TapRow:
    """Return a row held to another tolerance; its numbers stay."""
    held = replace(row, floor=tolerance.floor, bound=dict(tolerance.bound))
    status = row_status(held)
    note = row.note if status == "invalid" else None
    if status == "diverged":
        note = "; ".join(violations(held, held.bound))
    return replace(held, status=status, note=note)


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
    ordered = sorted(rows, key=execution_key)
    at = next((i for i, row in enumerate(ordered) if row_status(row) in states), None)
    if at is None:
        return None
    found, before = ordered[at], ordered[at - 1] if at else None
    after = before.tap if before is not None and before.pass_index == found.pass_index else None
    return Location(found.pass_index, found.pass_kind, found.tap, found.worst_token, found.note, after)


def decide(rows: Sequence[TapRow], coverage: Coverage) -> Parity:
    """Return the verdict of a layer comparison.

    Any diverged or invalid row (NaN, shape mismatch) is a divergence. Otherwise anything required that was not
    compared, a repeated row, or nothing compared at all makes it incomplete. Only the rest is parity.
    """
    if any(row_status(row) in ("diverged", "invalid") for row in rows):
        return "divergence"
    keys = {(row.pass_index, row.tap) for row in rows}
    complete = 0 < coverage.required == coverage.compared == len(keys) == len(rows) and not coverage.skipped
    return "parity" if complete else "incomplete"


def logits_agree(row: TapRow, policy: PolicyName) -> bool:
    """Return whether the logits of a step are as equal as the engines' stated numerics make them.

    Engines that state the same arithmetic (``same``) compute the same bits; others agree within bounds.
    """
    status = row_status(row)
    return status == "equal" or (status == "within" and policy != "same")


def decide_greedy(prompts: Sequence[GreedyPrompt], policy: PolicyName) -> Parity:
    """Return the verdict of the direct comparison of a greedy run.

    A different token (a near tie is explained, not forgiven), or logits that do not agree (``logits_agree``), is a
    divergence. Fewer steps than required, or no prompt at all, is incomplete.
    """
    for prompt in prompts:
        tokens_differ = any(step.candidate_token != step.reference_token for step in prompt.steps)
        own_differ = prompt.candidate_tokens[: len(prompt.steps)] != prompt.reference_tokens[: len(prompt.steps)]
        if tokens_differ or own_differ:
            return "divergence"
        if not all(logits_agree(step.logits, policy) for step in prompt.steps):
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


def compare_tap(
    name: str,
    pass_index: int,
    plan: PassPlan,
    candidate: TapArray,
    reference: TapArray,
    tolerance: Tolerance,
    *,
    nan_aside: bool = False,
) -> TapRow | Skip:
    """Compare one tap of one pass over the tokens both engines give; ``Skip`` when they share none.

    ``nan_aside``: tokens that hold NaN in the same places in both engines are left out.

    Attention scores (``kq``) are compared up to each token's own position: what the causal mask hides is never
    read, and engines need not compute it. ``kq_soft_max`` is compared whole (zero there).
    """

    def invalid(note: str) -> TapRow:
        return judged(TapRow(pass_index, plan.kind, name, note=note), tolerance)

    n_tokens = len(plan.token_ids)
    for side, tap in zip(SIDES, (candidate, reference), strict=True):
        problem = _malformed(name, tap, n_tokens)
        if problem:
            return invalid(f"{side}: {problem}")
    in_candidate, in_reference = (
        range(n_tokens) if tap.rows is None else tap.rows for tap in (candidate, reference)
    )
    common = sorted(set(in_candidate) & set(in_reference))
    if not common:
        return Skip(pass_index, name, "the candidate and the reference give it for different tokens")
    c, r = (
        taps.take_rows(name, tap.array, rows, common)
        for tap, rows in ((candidate, in_candidate), (reference, in_reference))
    )
    if c.shape != r.shape:
        note = f"shape mismatch: candidate {candidate.array.shape}, reference {reference.array.shape}"
        return invalid(note)
    if nan_aside:
        alike = _alike_nan(c, r, token_axis(name))
        if alike.all():
            return Skip(pass_index, name, "both engines hold NaN at the same places of every token")
        if alike.any():
            kept = [row for row, gone in zip(common, alike, strict=True) if not gone]
            c, r = (taps.take_rows(name, array, common, kept) for array in (c, r))
            common = kept
    positions = np.asarray(common) + plan.start
    visible = taps.visible(name, c.shape, positions)
    metrics = measure(c, r, token_axis=token_axis(name), visible=visible)
    counts = zip(SIDES, (metrics.candidate_nonfinite, metrics.reference_nonfinite), strict=True)
    unusable = "; ".join(f"{side} holds {count} NaN or infinite values" for side, count in counts if count)
    row = TapRow(
        pass_index,
        plan.kind,
        name,
        rows_compared=metrics.n_tokens,
        worst_token=None if metrics.worst_token is None else int(positions[metrics.worst_token]),
        token_nmse=_token_nmse(name, metrics, n_tokens),
        note=unusable or None,
        **{metric: getattr(metrics, metric) for metric in _SHARED_METRICS},
    )
    return judged(row, tolerance)


def _token_nmse(name: str, metrics: Metrics, n_tokens: int) -> tuple[float | None, ...] | None:
    if not keeps_tokens(name, metrics.n_tokens, n_tokens):
        return None
    if metrics.worst_token is None or metrics.token_nmse is None:
        return None
    return tuple(None if value is None else rounded(value) for value in metrics.token_nmse)


def keeps_tokens(tap: str, n_compared: int, n_tokens: int) -> bool:
    """Return whether a row of so many tokens of a pass keeps each token's error, where values differ."""
    return 1 < n_compared == n_tokens <= MAX_TOKENS_SHOWN and taps.in_outline(tap)


def rounded(nmse: float) -> float:
    """Return an NMSE to the three digits that are kept of each token's."""
    return float(f"{nmse:.2e}")


def _alike_nan(c: npt.NDArray[np.float32], r: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.bool_]:
    """Return which tokens hold NaN in both arrays, at the same places."""
    others = tuple(i for i in range(c.ndim) if i != axis)
    ours, theirs = np.isnan(c), np.isnan(r)
    return np.asarray(ours.any(axis=others) & (ours == theirs).all(axis=others))


def _malformed(name: str, tap: TapArray, n_tokens: int) -> str | None:
    array, axis = tap.array, token_axis(name)
    if array.dtype != np.float32 or array.ndim <= axis or array.size == 0:
        return f"{array.dtype} array of shape {array.shape} instead of float32 with one row per token"
    try:
        check_rows(name, tap.rows, n_tokens)
    except ValueError as error:
        return str(error)
    n_rows = n_tokens if tap.rows is None else len(tap.rows)
    if array.shape[axis] != n_rows:
        return f"shape {array.shape} does not fit {n_rows} tokens"
    return None


def choose_policy(
    candidate: EngineIdentity, reference: EngineIdentity, computed: Collection[Dtype] = ()
) -> PolicyName:
    """Return ``same`` when both engines state the same rounding as bitnet.cpp's family, else ``independent``.

    An engine that computes in a 16-bit format, as it states or as its audit found (``computed``), is held to that
    format's table, and so is the engine that it is compared with. ``blocks`` is for two of which one quantises
    activations in blocks and the other does not.
    """
    ours, theirs = candidate.numerics, reference.numerics
    formats = {*ours.formats, *theirs.formats, *computed}
    if "bf16" in formats:
        return "bf16"
    if "f16" in formats:
        return "f16"
    if ours.quantizer_block != theirs.quantizer_block:
        return "blocks"
    known = ours.simd_width is not None and ours.fused_quantizer is not None
    return "same" if known and ours == theirs else "independent"
