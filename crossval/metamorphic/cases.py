"""Which checks there are: what is asked for decides their names, so that none can go missing unnoticed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Relation = Literal["one_by_one", "prefix", "split", "reset", "capture", "threads", "kernels"]
Expectation = Literal["bits", "floor"]

LENGTHS = (1, 2, 3, 4, 5, 7, 32, 33)
"""Around the groups of 4 columns and of 32 cells in which engines of this family work."""
GROUP = 32
"""A multiple of the columns and cells that any kernel takes at once."""
THREAD_COUNTS = (1, 2, 3)
N_DECODE = 2


@dataclass(frozen=True)
class Options:
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


RESET_CASE = "after another sequence"
CAPTURE_CASE = "logits"
UP_TO_ATTENTION, ATTENTION, ALL_LAYERS = "layer 0 up to attention", "layer 0 kqv_out", "all layers"
"""Parts of a check of two arithmetics."""


def tokens_case(count: int) -> str:
    """Return the case of a prompt of ``count`` tokens."""
    return f"{count} token{'s' if count > 1 else ''}"


def prefix_case(length: int, n_prefix: int) -> str:
    """Return the case of the first ``length`` tokens of a longer prompt."""
    return f"{length} of {tokens_case(n_prefix)}"


def split_case(n_tokens: int, point: int) -> str:
    """Return the case of a prompt in two passes."""
    return f"{n_tokens} tokens as {point} + {n_tokens - point}"


def threads_case(count: int) -> str:
    """Return the case of a number of threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


def split_points(n_tokens: int) -> list[int]:
    """Return where a prompt is split: near both ends and in the middle."""
    return sorted({p for p in (1, 2, 3, n_tokens // 2, n_tokens - 2, n_tokens - 1) if 0 < p < n_tokens})


def splits_into_one_form(n_tokens: int, point: int, *, single_head: bool) -> bool:
    """Tell whether both parts have the arithmetic of the whole.

    A first token alone gives itself all of its attention: 1.0, which binary16 holds.
    """
    return n_tokens - point > 1 and (point > 1 or not single_head)


def required(options: Options, *, stated: bool, single_head: bool) -> Iterator[tuple[Relation, str, Expectation]]:
    """Yield relation, case and expectation of every check, in the order in which they are made.

    ``stated``: the engine says that it rounds as bitnet.cpp's family does. ``single_head``: of attention.
    """

    def two_forms(relation: Relation, case: str) -> Iterator[tuple[Relation, str, Expectation]]:
        if stated:
            yield relation, f"{case}, {UP_TO_ATTENTION}", "bits"
            if not single_head:
                yield relation, f"{case}, {ATTENTION}", "floor"
        yield relation, f"{case}, {ALL_LAYERS}", "floor"

    one_form: Expectation = "bits" if stated else "floor"
    lengths = sorted(set(options.lengths))
    longest = lengths[-1]
    for length in lengths:
        if length == 1:
            yield "one_by_one", tokens_case(1), "bits"
        else:
            yield from two_forms("one_by_one", tokens_case(length))
    for length in lengths:
        if length > 1:
            yield "prefix", prefix_case(length, options.n_prefix), one_form
    for point in split_points(longest):
        case = split_case(longest, point)
        if splits_into_one_form(longest, point, single_head=single_head):
            yield "split", case, one_form
        else:
            yield from two_forms("split", case)
    yield "reset", RESET_CASE, "bits"
    yield "capture", CAPTURE_CASE, "bits"
    for count in dict.fromkeys(options.thread_counts):
        yield "threads", threads_case(count), "bits"
    for kernel in dict.fromkeys(options.kernels):
        yield "kernels", kernel, "bits"
