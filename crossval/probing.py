"""More prompts of a live engine, run to tell causes apart that explain the recorded passes equally."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from crossval.audit.bounds import Arithmetic
from crossval.diagnose import narrowed
from crossval.diagnosis import Diagnosis
from crossval.errors import BadInputError
from crossval.ops import Op, SpecConfig, WeightSource
from crossval.runners.base import Runner
from crossval.variants import Context, of_records

LENGTHS = (8, 11, 14, 27, 45)
"""Tokens of the prompts: what is left over after groups of 2, 4, 8, 16 or 32 differs in one of them at least."""


def tell_apart(
    found: Diagnosis,
    runner: Runner,
    op: Op,
    names: Collection[str],
    tokens: Sequence[int],
    config: SpecConfig,
    weights: WeightSource,
    arithmetic: Arithmetic,
) -> Diagnosis:
    """Return a diagnosis without the causes that prompts of other lengths exclude.

    Nothing is run for an engine that plays a recording back, or where one cause is left already. The prompts are
    made of ``tokens``, repeated where they are too few; ``names`` is captured.

    Raises:
        UnavailableError, EngineCrashError: from the runner.
    """
    if len(found.candidates) < 2 or runner.status != "live" or runner.plan is not None or not tokens:
        return found
    for context in _prompts(runner, op, names, tokens, config, weights):
        if len(found.candidates) < 2:
            break
        found = narrowed(found, context, arithmetic)
    return found


def _prompts(
    runner: Runner,
    op: Op,
    names: Collection[str],
    tokens: Sequence[int],
    config: SpecConfig,
    weights: WeightSource,
) -> Iterator[Context]:
    for n in LENGTHS:
        if n > config.context_length:
            return
        runner.reset()
        record = runner.eval([tokens[i % len(tokens)] for i in range(n)], names)
        try:
            yield of_records(op, [record], config, weights)
        except BadInputError:  # not recorded in this pass
            continue
