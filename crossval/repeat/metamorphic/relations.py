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
independent engines. bitnet.cpp's main and mainline llama.cpp add up the scores of a single token in another order:
there bits are equal up to RoPE only, and all that follows is held to the floor. Passes of two or more tokens are
one arithmetic whatever their length, without flash attention, which these checks are not for. An engine that does
not state this arithmetic is held to the floor alone where passes differ in length.

Where bits must agree they must in every tap of every layer; of these a digest per token is kept, not the values.

Faults that every way of running shares show in none of these relations, and those of single-token passes beyond
layer 0 only when they exceed the floor: the op-local audit (``crossval.audit``) finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from bitnet_py.errors import BitnetError
from crossval.compare.rerun import Chunks, Names, OpenRunner, at_once, require_live
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import Runner, longest_pass
from crossval.repeat.metamorphic.cases import MetamorphicOptions, PlannedCheck, Relation, Sizes, required
from crossval.repeat.metamorphic.notebook import MetamorphicResult, Notebook
from crossval.repeat.metamorphic.runs import Recorded
from crossval.repeat.metamorphic.scope import Form, measured_taps
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
    architecture: str | None = None,
    input_norms: bool = False,
    side: Side = "candidate",
    options: MetamorphicOptions | None = None,
    progress: Progress | None = None,
) -> MetamorphicResult:
    """Run every relation asked for on one engine.

    ``architecture``, ``input_norms``: of the model (``passes.Numerics.inside_others``).
    ``open_runner()`` returns a runner that has not been entered; ``open_runner(n_threads=...)`` and
    ``open_runner(kernel=...)`` the same engine with that option. One or two are open at a time.

    Raises:
        BadInputError: too few tokens (``enough_tokens`` helps), no lengths, or a recorded trace.
        UnavailableError, EngineCrashError: from the engine as it is usually opened.
    """
    options = options or MetamorphicOptions()
    if not options.lengths or min(options.lengths) < 1 or options.n_decode < 1 or n_layers < 1:
        raise BadInputError("metamorphic checks need prompt lengths of at least 1, a layer, and a token to decode")
    if len(ids) < options.n_tokens:
        raise BadInputError(
            f"metamorphic checks need {options.n_tokens} tokens, got {len(ids)}: give a longer text "
            "or shorter lengths"
        )
    with open_runner() as runner:
        require_live(runner)
        _check_lengths(options, longest_pass(runner))
        numerics, names = runner.identity.numerics, Names.of(runner, n_layers, int(ids[0]))
        stated = numerics.simd_width is not None and numerics.fused_quantizer is not None
        form = Form.of(names.n_heads, numerics, architecture, input_norms)
        cases = list(required(options, stated=stated, scores_vary=form.scores_vary))
        book = Notebook(side, numerics, n_layers, names, form)
        work = _Work(runner, open_runner, tuple(map(int, ids)), cases, book)
        report = progress or (lambda *_: None)
        for index, case in enumerate(cases):
            report("checking the engine against itself", index, len(cases))
            work.check(case)
        report("checking the engine against itself", len(cases), len(cases))
        engine = runner.identity.name
    return MetamorphicResult(side, engine, tuple(book.checks), len(cases))


def _check_lengths(options: MetamorphicOptions, longest: int | None) -> None:
    needed = max(*options.lengths, options.n_prefix)
    if longest is not None and needed > longest:
        raise BadInputError(
            f"these lengths need passes of {needed} tokens, the engine takes {longest}: give shorter lengths"
        )


@dataclass
class _Work:
    """One engine, its tokens, and the notebook of its checks."""

    runner: Runner
    open_runner: OpenRunner
    ids: tuple[int, ...]
    cases: Sequence[PlannedCheck]
    book: Notebook
    held: dict[tuple[Relation, Sizes], Recorded] = field(default_factory=dict)
    """Runs that the next check of the same relation may share."""

    def check(self, case: PlannedCheck) -> None:
        """Run the engine both ways and compare."""
        if case.relation in ("one_by_one", "prefix", "split"):
            self.book.compare(case, *self._two_feeds(case))
        elif case.relation == "reset":
            usual = self._chunks(case.one)
            befores = (usual, at_once(self.runner, self.ids[::-1]))
            same, other = (self._record(self.runner, usual, before) for before in befores)
            self.book.compare(case, other, same)
        elif case.relation == "capture":
            captured = self._record(self.runner, self._chunks(case.one))
            self.book.compare(case, captured, Recorded.make(self.runner, captured.chunks, Names((LOGITS,))))
        elif case.relation == "threads":
            self._otherwise(case, "n_threads")
        else:
            self._otherwise(case, "kernel")

    def _chunks(self, sizes: Sizes) -> Chunks:
        return tuple(self.ids[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))

    def _record(self, runner: Runner, chunks: Chunks, before: Chunks = ()) -> Recorded:
        return Recorded.make(runner, chunks, self.book.names, before=before)

    def _two_feeds(self, case: PlannedCheck) -> tuple[Recorded, Recorded]:
        """Return the runs over both cuts of a prompt; one run token by token serves all lengths."""
        mine = [one for one in self.cases if one.relation == case.relation]
        values = measured_taps(self.book.n_layers) if any(one.expectation == "floor" for one in mine) else ()
        longest = max((one.other for one in mine), key=len) if case.relation == "one_by_one" else case.other
        first, second = wanted = [(case.relation, sizes) for sizes in (case.one, longest)]
        self.held = {key: self.held[key] for key in wanted if key in self.held}
        for key in wanted:
            if key not in self.held:
                self.held[key] = Recorded.make(self.runner, self._chunks(key[1]), self.book.names, values)
        return self.held[first], self.held[second].beginning(len(case.other))

    def _otherwise(self, case: PlannedCheck, option: str) -> None:
        """Compare with the same engine opened with an option; one that cannot be opened so is unchecked."""
        usual = self._chunks(case.one)
        with ExitStack() as stack:
            try:
                runner = stack.enter_context(self.open_runner(**{option: case.option}))
            except (UnavailableError, BitnetError) as error:
                self.book.unchecked(case, f"cannot be run: {error}")
                return
            says = runner.identity.settings.get(option)
            if says != case.option:
                self.book.unchecked(case, f"the engine was asked for it, and says {option} = {says}")
                return
            self.book.compare(case, self._record(runner, usual), self._record(self.runner, usual))
