"""Which checks there are: what is asked for decides their names, so that none can go missing unnoticed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

Relation = Literal["one_by_one", "prefix", "split", "reset", "capture", "threads", "kernels"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
Expectation = Literal["bits", "floor"]

LENGTHS = (1, 2, 3, 4, 5, 7, 32, 33)
"""Around the groups of 4 columns and of 32 cells in which engines of this family work."""
GROUP = 32
"""A multiple of the columns and cells that any kernel takes at once."""
THREAD_COUNTS = (1, 2, 3)
N_DECODE = 2


@dataclass(frozen=True)
class MetamorphicOptions:
    """What to check. Empty ``thread_counts`` or ``kernels``: that relation is not asked for."""

    lengths: Sequence[int] = LENGTHS
    thread_counts: Sequence[int] = THREAD_COUNTS
    kernels: Sequence[str] = ()
    """Kernel families by name; every one that is named has to run."""
    n_decode: int = N_DECODE
    """Tokens decoded after the longest prompt."""

    @property
    def n_tokens(self) -> int:
        """Tokens the checks need: the longest prompt and what is decoded after it, or ``n_prefix``."""
        return max(max(self.lengths, default=0) + self.n_decode, self.n_prefix)

    @property
    def n_prefix(self) -> int:
        """Length of the prompt whose beginnings the others are: whole groups, so none shares its remainder."""
        return (max(self.lengths, default=0) // GROUP + 1) * GROUP


Sizes = tuple[int, ...]
"""Tokens of each pass of a run."""
TapSet = Literal["all", "beginnings", "logits", "exact", "attention", "rest"]
"""Which of the recorded taps a check compares (``crossval.repeat.metamorphic.scope``)."""


def place(tap: str, token: int | None, one: Sizes, other: Sizes) -> str:
    """Return a tap, a token's position, and the pass that holds it: of both runs where these differ."""
    if token is None:
        return tap
    first, second = (bisect_right(list(accumulate(sizes)), token) for sizes in (one, other))
    return f"{tap}, token {token}, " + (f"pass {first}" if first == second else f"passes {first} and {second}")


@dataclass(frozen=True)
class PlannedCheck:
    """One check that is asked for: what is expected, the passes of both runs, and which taps are compared."""

    relation: Relation
    case: str
    expectation: Expectation
    one: Sizes
    other: Sizes
    part: TapSet = "all"
    option: int | str | None = None
    """Number of threads, or kernel family, of the first run; None: as usual."""

    @property
    def key(self) -> tuple[Relation, str, Expectation]:
        """What a check is known by."""
        return self.relation, self.case, self.expectation


UP_TO_ATTENTION, ATTENTION, ALL_LAYERS = "layer 0 up to attention", "layer 0 kqv_out", "all layers"
"""Parts of a check of two arithmetics."""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _split_points(n_tokens: int) -> list[int]:
    """Return where a prompt is split: near both ends and in the middle."""
    return sorted({p for p in (1, 2, 3, n_tokens // 2, n_tokens - 2, n_tokens - 1) if 0 < p < n_tokens})


def _splits_into_one_form(n_tokens: int, point: int, *, scores_vary: bool) -> bool:
    """Tell whether both parts have the arithmetic of the whole.

    A first token alone gives itself all of its attention: 1.0, which binary16 holds.
    """
    return n_tokens - point > 1 and (point > 1 or not scores_vary)


def required(options: MetamorphicOptions, *, stated: bool, scores_vary: bool) -> Iterator[PlannedCheck]:
    """Yield every check, in the order in which they are made.

    ``stated``: the engine says that it rounds as bitnet.cpp's family does. ``scores_vary``: ``scope.Form``.
    """

    def two_forms(relation: Relation, case: str, one: Sizes, other: Sizes) -> Iterator[PlannedCheck]:
        if stated:
            yield PlannedCheck(relation, f"{case}, {UP_TO_ATTENTION}", "bits", one, other, "exact")
            if not scores_vary:
                yield PlannedCheck(relation, f"{case}, {ATTENTION}", "floor", one, other, "attention")
        yield PlannedCheck(relation, f"{case}, {ALL_LAYERS}", "floor", one, other, "rest" if stated else "all")

    one_form: Expectation = "bits" if stated else "floor"
    lengths = sorted(set(options.lengths))
    longest, decoded = lengths[-1], (1,) * options.n_decode
    usual = (longest, *decoded)
    for length in lengths:
        if length == 1:
            yield PlannedCheck("one_by_one", "1 token", "bits", (1,), (1,))
        else:
            yield from two_forms("one_by_one", _counted(length, "token"), (length,), (1,) * length)
    for length in lengths:
        if length > 1:
            case = f"{length} of {_counted(options.n_prefix, 'token')}"
            yield PlannedCheck("prefix", case, one_form, (length,), (options.n_prefix,), "beginnings")
    for point in _split_points(longest):
        case, parts = f"{longest} tokens as {point} + {longest - point}", (point, longest - point, *decoded)
        if _splits_into_one_form(longest, point, scores_vary=scores_vary):
            yield PlannedCheck("split", case, one_form, usual, parts)
        else:
            yield from two_forms("split", case, usual, parts)
    yield PlannedCheck("reset", "after another sequence", "bits", usual, usual)
    yield PlannedCheck("capture", "logits", "bits", usual, usual, "logits")
    for count in dict.fromkeys(options.thread_counts):
        yield PlannedCheck("threads", _counted(count, "thread"), "bits", usual, usual, option=count)
    for kernel in dict.fromkeys(options.kernels):
        yield PlannedCheck("kernels", kernel, "bits", usual, usual, option=kernel)
