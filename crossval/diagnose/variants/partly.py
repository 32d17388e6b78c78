"""Two mistakes at once: some tokens or features are set aside because of their values, and the rest is explained.

What is set aside is visible in the values themselves: numbers that no product of the inputs can give, zeros, or
the correct values where the others are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.distance import LINEAR_FLOOR
from crossval.diagnose.variants.places import Flags, Rule, described, rules, runs
from crossval.diagnose.variants.variant import Candidate, Variant
from crossval.model.taps import BITLINEARS

Content = Literal["anything", "zero", "right"]

IMPOSSIBLE = 1e9
"""Values above this multiple of the largest possible result are memory that was never written."""
CHANCE_RUN = 4
"""Zeros of one or two tokens at this many consecutive features are not chance."""
MOSTLY = 0.5
"""Fraction of the values set aside that must differ from the explanation of the rest: one is not enough."""
WHAT = {"anything": "never written", "zero": "zero", "right": "right"}


@dataclass(frozen=True, eq=False)
class Apart:
    """Tokens and features of one pass that are not explained by what explains the rest."""

    tokens: Flags
    features: Flags
    content: Content

    def parts(self) -> Iterator[Part]:
        """Yield every rule that describes them; other passes tell the rules apart."""
        tokens, features = self.tokens, self.features
        if self.content == "right":  # said by where the others are
            tokens, features = ~tokens if tokens.any() else tokens, ~features if features.any() else features
        if tokens.any():
            for rule in rules(tokens):
                yield Part(self.content, described(tokens, "token"), rule)
        else:
            yield Part(self.content, described(features, "feature"), None, features)
            if self.content == "zero":
                yield Part(self.content, described(features, "feature"), None, features, of_weights=True)

    def rest(self, context: Context) -> Context:
        """Return the operation without them."""
        if self.tokens.any():
            return context.of_tokens(~self.tokens)
        have = np.arange(self.features.size) if context.features is None else context.features
        return context.sampled(have[~self.features[have]])


@dataclass(frozen=True, eq=False)
class Part:
    """A rule for what is set aside in a pass of any length."""

    content: Content
    symptom: str
    rule: Rule | None
    features: Flags | None = None
    of_weights: bool = False
    """Whether they are zeros because the weights are read as zeros."""

    @property
    def words(self) -> str:
        """Which tokens or features."""
        return self.symptom if self.rule is None else self.rule.words

    @property
    def name(self) -> str:
        """The mistake by itself."""
        if self.of_weights:
            return f"weight rows of {self.words} read as zeros"
        several = "" if self.rule is None else "in passes of several tokens, "
        return f"{several}{self.words} never written"

    @property
    def sentence(self) -> str:
        """The same with what is found there."""
        if self.of_weights:
            return self.name
        holds = "zeros" if self.content == "zero" else "what was in memory"
        return f"{self.name} ({holds})"

    def set_aside(self, context: Context, output: Array) -> Array:
        """Return an output with what this part holds instead."""
        held = {"anything": context.target, "zero": np.zeros_like(output), "right": context.expected}[self.content]
        if self.rule is not None:
            flags = self.rule.hits(context.n_tokens)[list(context.rows), None]
        else:
            assert self.features is not None
            flags = self.features if context.features is None else self.features[context.features]
        if self.content == "anything" and not _differs(context.target, output, flags):
            raise Inapplicable
        return np.where(~flags if self.content == "right" else flags, held, output)


def _differs(target: Array, output: Array, flags: Flags) -> bool:
    """Return whether all flagged tokens (or features) hold something else than the output."""
    size = np.sqrt(np.mean(output**2, axis=-1, keepdims=True))
    other = ~(np.abs(target - output) <= LINEAR_FLOOR * size)
    share = other.mean(axis=-1, keepdims=True) if flags.ndim == 2 else other.mean(axis=0)
    return bool((share > MOSTLY)[flags].all())


def aparts(context: Context) -> Iterator[Apart]:
    """Yield what can be set aside, the most visible first; the rest is never empty."""
    target = context.target
    bad = _impossible(context, target)
    none_of_tokens, none = np.zeros(target.shape[0], np.bool_), _numbered(context, np.zeros(0, np.int64))
    columns, rows = _any(bad, 0), _any(bad, -1)
    if rows.any():
        if bad[:, columns].all() and np.count_nonzero(columns) < columns.size // 2:
            if np.count_nonzero(bad) < CHANCE_RUN:
                return
            yield Apart(none_of_tokens, _numbered(context, columns), "anything")
        elif not rows.all():
            yield Apart(rows, none, "anything")
        return
    rows, columns = ~_any(target, -1), _zeros(target)
    if rows.any() and not rows.all():
        yield Apart(rows, none, "zero")
    if columns.any() and not columns.all():
        yield Apart(none_of_tokens, _numbered(context, columns), "zero")
    off = np.abs(target - context.expected)
    size = np.sqrt(np.mean(context.expected**2, axis=-1, keepdims=True))
    wrong = ~(off <= LINEAR_FLOOR * size)
    rows, columns = ~_any(wrong, -1), ~_any(wrong, 0)
    if rows.any() and not rows.all():
        yield Apart(rows, none, "right")
    if columns.any() and not columns.all():
        yield Apart(none_of_tokens, _numbered(context, columns), "right")


def _numbered(context: Context, flags: Flags) -> Flags:
    """Return flags of the sampled features as flags of all features."""
    found = np.zeros(context.recorded[0].size, np.bool_)
    found[np.flatnonzero(flags) if context.features is None else context.features[np.flatnonzero(flags)]] = True
    return found


def _any(array: Array, axis: int) -> Flags:
    return np.asarray(array.any(axis=axis), np.bool_)


def _impossible(context: Context, target: Array) -> Flags:
    x = context.inputs[0]
    largest = np.abs(x).max(axis=-1, keepdims=True) * x.shape[-1] * max(context.matrix.scale, 1.0)
    with np.errstate(invalid="ignore"):
        bad: Flags = ~(np.abs(target) <= IMPOSSIBLE * np.maximum(largest, 1.0))
    return bad


def _zeros(target: Array) -> Flags:
    flags = ~_any(target, 0)
    if target.shape[0] <= 2:
        kept = np.zeros_like(flags)
        for run in runs(flags):
            kept[run.start : run.stop] = len(run) >= CHANCE_RUN
        return kept
    return flags


def together(apart: Apart, bases: Sequence[Candidate | None]) -> Iterator[Candidate]:
    """Yield every mistake of the rest (None: it is correct) with every rule for what was set aside."""
    one = len(bases) == 1
    for base in bases:
        for part in apart.parts():
            if part.content == "right":
                if base is not None:
                    yield _only_there(base, part, one)
            else:
                yield _both(base, part, one)


def _both(base: Candidate | None, part: Part, alone: bool) -> Candidate:
    group = f"{part.symptom} {WHAT[part.content]}"
    if base is None:
        return _candidate(part.name, part.sentence, group, 15, lambda c: part.set_aside(c, c.expected))
    return _candidate(
        f"{base.name}; {part.name}",
        f"{base.explanation}; {part.sentence}",
        f"{base.name if alone else base.group}; {group}",
        base.variant.family,
        lambda c: part.set_aside(c, _made(base, c)),
    )


def _only_there(base: Candidate, part: Part, alone: bool) -> Candidate:
    """A mistake in some tokens or features; the values of the others are correct."""
    return _candidate(
        f"{base.name}, only in {part.words}",
        f"{base.explanation}; only {part.words} are wrong",
        f"{base.name if alone else base.group}, only in {part.symptom}",
        base.variant.family,
        lambda c: part.set_aside(c, _made(base, c)),
    )


def _made(base: Candidate, context: Context) -> Array:
    output = base.compute(context)
    if output is None:
        raise Inapplicable
    return output


def _candidate(
    name: str, sentence: str, group: str, family: int, function: Callable[[Context], Array]
) -> Candidate:
    variant = Variant("{}", "{}", lambda c, *_: function(c), group="{2}", family=family, ops=BITLINEARS)
    return Candidate(variant, name, sentence, (name, sentence, group))
