"""Which tokens and which pass recorded arrays belong to, read off the arrays: embedding rows, rotated queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit.altered import Altered
from crossval.audit.checks import Misrecorded
from crossval.capture import Source
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.kinds import Embedding, Rope
from crossval.model.op import Op, WeightSource
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord, TapArray, short_list

(EMBEDDING,) = taps.of_kind(Embedding)
ROTATIONS = tuple(op.output for op in taps.OPS.values() if isinstance(op.kind, Rope))
"""Of the first layer."""
NEAR = 1e-3
"""Relative L2 of a rotation at the correct positions: room for binary16."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Refeeding:
    """A recording with what its passes were really fed."""

    source: Source
    misrecorded: Misrecorded


def token_ids(rows: Array, table: Array) -> list[int] | None:
    """Return the ids whose embeddings these rows ``(n_tokens, dim)`` are, bit for bit; None when one has no id."""
    found = []
    for row in np.asarray(rows, np.float32):
        at = int(np.argmax(np.abs(row)))
        likely = np.flatnonzero(table[:, at].astype(np.float32) == row[at])
        ids = [int(i) for i in likely if np.array_equal(table[i].astype(np.float32), row)]
        if not ids or not row.any():
            return None
        found.append(ids[0])
    return found


def words(index: int, found: Sequence[int], given: Sequence[int]) -> str:
    """Say whose embeddings a pass holds."""
    if sorted(found) == sorted(given):
        return f"{EMBEDDING} of pass {index} holds its own tokens in another order: {short_list(found)}"
    return f"{EMBEDDING} of pass {index} belongs to token ids {short_list(found)}, not {short_list(given)}"


def embedded(source: Source, weights: WeightSource, n_passes: int | None = None) -> dict[int, list[int]]:
    """Return for each pass, by index, the token ids whose embeddings it holds; without passes of other rows.

    Raises:
        UnavailableError, EngineCrashError: from the runner.
    """
    return _ids(source.records([EMBEDDING], n_passes), weights)


def other_order(source: Source, weights: SpecWeights) -> Refeeding | None:
    """Return the recording with its passes reordered; None when they fit as they are, or in no order."""
    runner, plans = source.runner, source.plans
    if runner.status != "recorded" or runner.plan is None or len(plans) < 2:
        return None
    rotations = [op for op in op_table(weights.config) if op.output in ROTATIONS]
    given = source.records([EMBEDDING, *(name for op in rotations for name in (op.inputs[0], op.output))])
    ids = _ids(given, weights)
    belongs: list[int] = []
    for index, plan in enumerate(plans):
        sized = [at for at, other in enumerate(plans) if len(other.token_ids) == len(plan.token_ids)]
        fed = [at for at in sized if index not in ids or list(plans[at].token_ids) == ids[index]]
        fits = [at for at in fed if _rotated_at(given[index].taps, plans[at], rotations) is not False]
        belongs.append(index if index in fits or not fits else fits[0])
    moved = [index for index, at in enumerate(belongs) if at != index]
    if not moved or sorted(belongs) != list(range(len(plans))):
        return None
    shown = [name for name in (EMBEDDING, *ROTATIONS) if name in given[moved[0]].taps]
    told = Misrecorded(
        kind="order",
        taps=tuple(shown),
        passes=tuple(moved),
        explanation="; ".join(f"the arrays of pass {index} fit pass {belongs[index]}" for index in moved),
        remedy="write each pass's arrays under its own index, in the order in which they ran",
    )
    order = tuple(belongs.index(at) for at in range(len(plans)))
    return Refeeding(Altered(source, plans, order), told)


def other_tokens(source: Source, weights: SpecWeights) -> Refeeding | None:
    """Return the recording as one of other tokens; None when it is of these, or an engine may look up wrongly.

    An engine with a bug in its lookup takes the same wrong row for the same token everywhere: off by a number, or
    one row for all beyond a limit, or no correct one at all. Or it takes rows of the correct tokens elsewhere.
    A recording of another prompt with the same beginning does not look like that.
    """
    plans, found = source.plans, embedded(source, weights)
    wrong = [index for index in found if found[index] != list(plans[index].token_ids)]
    pairs = [pair for index in found for pair in zip(plans[index].token_ids, found[index], strict=True)]
    if not wrong or _by_lookup(pairs):
        return None
    for given, ids in ((plans[index].token_ids, found[index]) for index in wrong):
        if set(ids) <= set(given) or all(a != b for a, b in zip(given, ids, strict=True)):
            return None
    told = Misrecorded(
        kind="tokens",
        taps=(EMBEDDING,),
        passes=tuple(wrong),
        explanation="; ".join(words(index, found[index], plans[index].token_ids) for index in wrong),
        remedy="the arrays are of another prompt, or the engine was fed other tokens than stated; state its own",
    )
    fed = (replace(plan, token_ids=tuple(found.get(index, plan.token_ids))) for index, plan in enumerate(plans))
    return Refeeding(Altered(source, tuple(fed)), told)


def _by_lookup(pairs: Sequence[tuple[int, int]]) -> bool:
    """Return whether (given, found) ids may come from a bug in the lookup."""
    wrong = {(given, found) for given, found in pairs if given != found}
    mapping: dict[int, int] = {}
    for given, found in pairs:
        if mapping.setdefault(given, found) != found:
            return False
    offsets = {found - given for given, found in wrong}
    return len(offsets) == 1 or len({found for _, found in wrong}) == 1


def _ids(given: Sequence[PassRecord], weights: WeightSource) -> dict[int, list[int]]:
    table = np.asarray(weights["token_embd.weight"])
    found = {}
    for index, record in enumerate(given):
        tap = record.taps.get(EMBEDDING)
        ids = None if tap is None or tap.rows is not None else token_ids(tap.array, table)
        if ids is not None:
            found[index] = ids
    return found


def _rotated_at(given: Mapping[str, TapArray], plan: PassPlan, rotations: Sequence[Op]) -> bool | None:
    """Return whether queries and keys are rotated as at a pass's positions; None: not recorded."""
    known = None
    for op in rotations:
        before, after = given.get(op.inputs[0]), given.get(op.output)
        if before is None or after is None or before.rows is not None or after.rows is not None:
            continue
        expected = op.function(before.array.astype(np.float64), np.asarray(plan.positions, np.int64))
        off = float(np.linalg.norm(after.array - expected))
        if not off <= NEAR * float(np.linalg.norm(expected)):
            return False
        known = True
    return known
