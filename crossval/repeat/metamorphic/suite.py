"""Metamorphic checks: what one engine must give when it does the same work another way; no second engine needed.

==================  ===========================================================================  ==============
relation            the same tokens                                                              must agree
==================  ===========================================================================  ==============
``one_by_one``      fed at once and token by token, by prompt length                              see below
``prefix``          a prompt and the beginning of a longer one: later tokens reach no earlier     bits
``split``           a prompt in one pass and in two, then decoded                                 bits, see below
``reset``           again after another sequence filled the cache                                 bits
``capture``         with and without recording intermediate tensors (logits)                      bits
``threads``         by different numbers of threads                                               bits
``kernels``         by different kernel families                                                  bits
==================  ===========================================================================  ==============

bitnet.cpp's family multiplies attention weights with V in binary32 when a pass holds several tokens, and rounds
them to binary16 first when it holds one (docs/numerics.md). So a token alone and a token among others have equal
bits in layer 0 up to the softmax, differ there in ``kqv_out`` by no more than that rounding (a derived bound,
element by element), and from then on by the int8 codes that it flips: as ``crossval.model.tolerance`` allows two
independent engines. Passes of two or more tokens are one arithmetic whatever their
length. An engine that does not state this arithmetic is held to the floor alone where passes differ in length.

Where bits must agree they must in every tap of every layer; of these a digest per token is kept, not the values.

Faults that every way of running shares show in none of these relations, and those of single-token passes beyond
layer 0 only when they exceed the floor: the op-local audit (``crossval.audit``) finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from bitnet_py.errors import BitnetError
from crossval.compare.rerun import Chunks, Names, OpenRunner, one_by_one, one_pass, require_live, split
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import Runner
from crossval.repeat.metamorphic.cases import (
    CAPTURE_CASE,
    RESET_CASE,
    Options,
    Relation,
    prefix_case,
    split_case,
    split_points,
    splits_into_one_form,
    threads_case,
    tokens_case,
)
from crossval.repeat.metamorphic.checks import MetamorphicResult, Notebook, decide
from crossval.repeat.metamorphic.runs import Recorded
from crossval.terms import LOGITS, Progress, Side


def enough_tokens(ids: Sequence[int], vocab_size: int, n_tokens: int) -> tuple[int, ...]:
    """Return ``ids``, continued with arbitrary but always the same tokens up to ``n_tokens``."""
    missing = n_tokens - len(ids)
    more = np.random.default_rng(n_tokens).integers(0, vocab_size, max(0, missing))
    return (*map(int, ids), *map(int, more))


def run_metamorphic(
    open_runner: OpenRunner,
    ids: Sequence[int],
    *,
    n_layers: int,
    side: Side = "candidate",
    options: Options | None = None,
    progress: Progress | None = None,
) -> MetamorphicResult:
    """Run every relation asked for on one engine.

    ``open_runner()`` returns a runner that has not been entered; ``open_runner(n_threads=...)`` and
    ``open_runner(kernel=...)`` the same engine with that option. One or two are open at a time.

    Raises:
        BadInputError: too few tokens (``enough_tokens`` helps), no lengths, or a recorded trace.
        UnavailableError, EngineCrashError: from the engine as it is usually opened.
    """
    options = options or Options()
    if not options.lengths or min(options.lengths) < 1 or options.n_decode < 1 or n_layers < 1:
        raise BadInputError("metamorphic checks need prompt lengths of at least 1, a layer, and a token to decode")
    if len(ids) < options.n_tokens:
        raise BadInputError(
            f"metamorphic checks need {options.n_tokens} tokens, got {len(ids)}: give a longer text "
            "or shorter lengths"
        )
    with open_runner() as runner:
        require_live(runner)
        names = Names.of(runner, n_layers, int(ids[0]))
        book = Notebook(side, runner.identity.numerics, n_layers, names)
        work = _Work(runner, open_runner, tuple(map(int, ids)), options, book)
        steps = (work.one_by_one, work.prefix, work.split, work.reset, work.capture, work.threads, work.kernels)
        for index, step in enumerate(steps):
            if progress is not None:
                progress("checking the engine against itself", index, len(steps))
            step()
        engine = runner.identity.name
    if progress is not None:
        progress("checking the engine against itself", len(steps), len(steps))
    checks = tuple(book.checks)
    return MetamorphicResult(side, engine, checks, book.n_required, decide(checks, book.n_required))


@dataclass
class _Work:
    """One engine, its tokens, and the notebook of its checks; one method per relation."""

    runner: Runner
    open_runner: OpenRunner
    ids: tuple[int, ...]
    options: Options
    book: Notebook

    @property
    def longest(self) -> int:
        return max(self.options.lengths)

    @property
    def usual(self) -> Chunks:
        """The longest prompt at once, then single tokens."""
        end = self.longest + self.options.n_decode
        return one_pass(self.ids[: self.longest]) + one_by_one(self.ids[self.longest : end])

    def _record(self, chunks: Chunks, runner: Runner | None = None, before: Chunks = ()) -> Recorded:
        return Recorded.make(runner or self.runner, chunks, self.book.names, before=before)

    def _with_values(self, chunks: Chunks) -> Recorded:
        """Record for a check that may have to measure."""
        return Recorded.make(self.runner, chunks, self.book.names, self.book.measured)

    def one_by_one(self) -> None:
        single = self._with_values(one_by_one(self.ids[: self.longest]))
        for length in sorted(set(self.options.lengths)):
            # The beginning of the long run is the run of the beginning: a later pass cannot change an earlier one.
            at_once, beginning = self._with_values(one_pass(self.ids[:length])), single.beginning(length)
            if length == 1:
                self.book.bits("one_by_one", tokens_case(1), at_once, beginning)
            else:
                self.book.two_forms("one_by_one", tokens_case(length), at_once, beginning)

    def prefix(self) -> None:
        lengths = [n for n in sorted(set(self.options.lengths)) if n > 1]
        if not lengths:
            return
        record = self._record if self.book.stated else self._with_values
        long = record(one_pass(self.ids[: self.options.n_prefix]))
        # The last layer need not give its output for tokens in the middle.
        names = [name for name in self.book.names.all if not self.book.may_be_gathered(name)]
        for length in lengths:
            self.book.same_form(
                "prefix",
                prefix_case(length, self.options.n_prefix),
                record(one_pass(self.ids[:length])),
                long,
                names,
            )

    def split(self) -> None:
        n = self.longest
        points = split_points(n)
        if not points:
            return
        whole = self._with_values(self.usual)
        for point in points:
            case = split_case(n, point)
            parts = self._with_values(split(self.ids[:n], point) + self.usual[1:])
            if splits_into_one_form(n, point, single_head=self.book.has_single_head(whole)):
                self.book.same_form("split", case, whole, parts)
            else:
                self.book.two_forms("split", case, whole, parts)

    def reset(self) -> None:
        befores = (self.usual, one_pass(self.ids[::-1]))
        same, other = (self._record(self.usual, before=before) for before in befores)
        self.book.bits("reset", RESET_CASE, other, same)

    def capture(self) -> None:
        captured = self._record(self.usual)
        plain = Recorded.make(self.runner, self.usual, Names((LOGITS,)))
        self.book.bits("capture", CAPTURE_CASE, captured, plain, [LOGITS])

    def threads(self) -> None:
        for count in dict.fromkeys(self.options.thread_counts):
            self._otherwise("threads", threads_case(count), "n_threads", count)

    def kernels(self) -> None:
        for kernel in dict.fromkeys(self.options.kernels):
            self._otherwise("kernels", kernel, "kernel", kernel)

    def _otherwise(self, relation: Relation, case: str, option: str, value: int | str) -> None:
        """Compare with the same engine opened with an option; one that cannot be opened so is unchecked."""
        with ExitStack() as stack:
            try:
                runner = stack.enter_context(self.open_runner(**{option: value}))
            except (UnavailableError, BitnetError) as error:
                self.book.unchecked(relation, case, f"cannot be run: {error}")
                return
            says = runner.identity.settings.get(option)
            if says != value:
                self.book.unchecked(relation, case, f"the engine was asked for it, and says {option} = {says}")
                return
            self.book.bits(relation, case, self._record(self.usual, runner), self._record(self.usual))
