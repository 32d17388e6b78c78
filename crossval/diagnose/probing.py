"""More evidence to tell apart causes that explain the recorded passes equally: probe prompts, and the logits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from crossval.audit.bounds import Arithmetic
from crossval.capture import run
from crossval.diagnose.diagnosis import Diagnosis, joined
from crossval.diagnose.search import narrowed
from crossval.diagnose.variants import Context, of_records
from crossval.errors import BadInputError
from crossval.model.config import SpecConfig
from crossval.model.op import Op, WeightSource
from crossval.passes import PassRecord, Runner
from crossval.terms import LOGITS

TABLE = 10
"""Family of bugs in the weights multiplied by or looked up, among them embedding rows read as zeros."""
LENGTHS = (8, 11, 14, 27, 45)
"""Lengths of the probe prompts: in at least one the remainder after groups of 2, 4, 8, 16 or 32 differs."""


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

    Nothing is run for an engine that replays a trace, or when only one cause is left. The prompts are made of
    ``tokens``, repeated if there are too few; ``names`` is captured.

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
        (record,) = run(runner, [[tokens[i % len(tokens)] for i in range(n)]], names)
        try:
            yield of_records(op, [record], config, weights)
        except BadInputError:  # not recorded in this pass
            continue


def by_the_head(found: Diagnosis, records: Sequence[PassRecord], config: SpecConfig) -> Diagnosis:
    """Return the diagnosis of an embedding without the causes that the logits exclude.

    A tied head multiplies by the same table. If the logits of all ids whose embedding is zero are also zero, and
    others are not, the rows of the table are zero: tokens that were not written would not have affected the
    logits. Logits that are not zero exclude nothing, since an engine may hold the table twice.
    """
    if len(found.candidates) < 2 or not config.tied_head:
        return found
    zero: set[int] = set()
    for record in records:
        rows = record.taps["inp_embd"].array
        zero |= {token for token, row in zip(record.plan.token_ids, rows, strict=False) if not row.any()}
    logits = [record.taps[LOGITS].array for record in records if LOGITS in record.taps]
    if not zero or not logits:
        return found
    whole = np.concatenate(logits)
    if whole[:, sorted(zero)].any() or not whole.any():
        return found
    return joined(found, [one for one in found.replays if one.variant.family == TABLE])
