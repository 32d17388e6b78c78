"""What is kept of a tap in place of its values: a digest of every token's row, which sees every changed bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crossval.compare.rows import Skip
from crossval.model import taps
from crossval.model.taps import token_axis
from crossval.passes import PassPlan, TapArray, check_rows

DIGEST_BYTES = 16
"""Of BLAKE2b: two different rows have one digest with a probability of 2^-128."""


@dataclass(frozen=True)
class TapDigests:
    """One tap of a run; row ``i`` of the arrays belongs to the token at ``positions[i]``, ascending."""

    shape: tuple[int, ...]
    """Of one token's row; of attention scores without the keys."""
    positions: npt.NDArray[np.int64]
    n_keys: npt.NDArray[np.int64]
    """Attention scores: keys in the token's pass. 1 of other taps."""
    digests: npt.NDArray[np.uint64]
    """Shape ``(n_tokens, 2)``."""
    finite: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TapDifference:
    """One tap of two runs, at the tokens both give."""

    tap: str
    n_elements: int
    different: tuple[int, ...] = ()
    """Positions of the tokens whose bits differ."""
    not_finite: tuple[int, ...] = ()
    """Positions of the tokens that hold NaN or infinity in a run."""
    note: str | None = None
    """Why the runs cannot be compared, or what is wrong with their values."""

    @property
    def invalid(self) -> bool:
        """Whether the values are not finite or the shapes do not fit."""
        return self.note is not None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Positions of all tokens with something to say about."""
        return tuple(sorted({*self.different, *self.not_finite}))


def digest_tap(name: str, tap: TapArray, plan: PassPlan) -> TapDigests:
    """Return the digests of one tap of one pass.

    What the causal mask hides is left out of ``kq``, as in ``compare_tap``. ``kq_soft_max`` counts whole;
    zeros on the right are not part of its digest, so that passes over fewer keys compare with passes over more.

    Raises:
        ValueError: the array is not float32, or its shape does not fit the pass.
    """
    axis, n_tokens, shape = token_axis(name), len(plan.token_ids), tap.array.shape
    check_rows(name, tap.rows, n_tokens)
    at = range(n_tokens) if tap.rows is None else tap.rows
    scores = taps.has_keys(name)
    fits = tap.array.dtype == np.float32 and len(shape) > axis + scores and shape[axis] == len(at)
    if not fits or not tap.array.size:
        raise ValueError(f"{name}: {tap.array.dtype} array of shape {shape} does not fit {len(at)} tokens")
    positions = np.asarray([plan.start + row for row in at], np.int64)
    by_token = np.moveaxis(tap.array, axis, 0)
    of_token, n_keys = by_token.shape[1:], 1
    if not scores:
        rows = [np.ascontiguousarray(row) for row in by_token]
    else:
        of_token, n_keys = of_token[:-1], shape[-1]
        if n_keys <= positions[-1]:
            raise ValueError(f"{name}: {n_keys} keys do not fit a token at position {positions[-1]}")
        rows = [_row_of_scores(name, row, int(at)) for row, at in zip(by_token, positions, strict=True)]
    return TapDigests(of_token, positions, np.full_like(positions, n_keys), _digests(rows), _finite(rows))


def _row_of_scores(name: str, row: npt.NDArray[np.float32], position: int) -> npt.NDArray[np.float32]:
    n_keys = position + 1
    if not taps.op_of(name).kind.unmasked:  # masked: what an engine leaves after the position is compared, too
        used = np.flatnonzero(np.ascontiguousarray(row).view(np.uint32).any(axis=0))
        n_keys = max(n_keys, int(used[-1]) + 1 if used.size else 0)
    return np.ascontiguousarray(row[..., :n_keys])


def _digests(rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.uint64]:
    found = b"".join(hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).digest() for row in rows)
    return np.frombuffer(found, np.uint64).reshape(-1, DIGEST_BYTES // 8)


def _finite(rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.bool_]:
    return np.asarray([bool(np.isfinite(row).all()) for row in rows])


def join(name: str, passes: Sequence[TapDigests]) -> TapDigests:
    """Put the passes of one run together.

    Raises:
        ValueError: their rows have different shapes.
    """
    shapes = sorted({one.shape for one in passes})
    if len(shapes) != 1:
        raise ValueError(f"{name}: the passes give rows that do not fit each other: {shapes}")
    return TapDigests(
        shapes[0],
        np.concatenate([one.positions for one in passes]),
        np.concatenate([one.n_keys for one in passes]),
        np.concatenate([one.digests for one in passes]),
        np.concatenate([one.finite for one in passes]),
    )


def until(one: TapDigests, end: int) -> TapDigests:
    """Return the part of the tokens before position ``end``."""
    n = int(np.searchsorted(one.positions, end))
    return TapDigests(one.shape, one.positions[:n], one.n_keys[:n], one.digests[:n], one.finite[:n])


def compare_digests(name: str, one: TapDigests, other: TapDigests) -> TapDifference | Skip:
    """Compare one tap of two runs at the tokens both give; ``Skip`` when they share none."""
    common, first, second = np.intersect1d(one.positions, other.positions, return_indices=True)
    if not common.size:
        return Skip(0, name, "the engine gives it for different tokens in the two runs")
    if one.shape != other.shape:
        return TapDifference(name, 0, note=f"shape mismatch: rows of {one.shape} and of {other.shape}")
    different = (one.digests[first] != other.digests[second]).any(axis=1)
    finite = one.finite[first] & other.finite[second]
    n_rows = math.prod(one.shape)
    if taps.op_of(name).kind.unmasked:
        n_elements = n_rows * int((common + 1).sum())  # up to each token's own position
    else:
        n_elements = n_rows * int(max(one.n_keys.max(), other.n_keys.max())) * len(common)
    return TapDifference(
        name,
        n_elements,
        tuple(map(int, common[different])),
        tuple(map(int, common[~finite])),
        None if finite.all() else f"{name} holds NaN or infinite values at {int((~finite).sum())} tokens",
    )
