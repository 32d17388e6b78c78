"""How must a matrix be read to be the checkpoint's? Readings of its codes, tried until one gives every value."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bitnet_py.checkpoint_model import permute, unpermute
from bitnet_py.layouts import WRONG_LAYOUTS
from crossval.weights.rows import Match

Codes = npt.NDArray[np.uint8]
Histogram = tuple[int, int, int, int]

TABLES: Mapping[str, tuple[tuple[int, int, int, int], str]] = {
    "signs flipped": ((2, 1, 0, 3), "codes 0 and 2 exchanged: +1 stored as -1"),
    "code 0 is 0": ((1, 2, 0, 3), "0, +1, -1 stored as codes 0, 1, 2"),
    "code 0 is +1": ((2, 0, 1, 3), "+1, -1, 0 stored as codes 0, 1, 2"),
    "code 0 and 1 exchanged": ((1, 0, 2, 3), "0, -1, +1 stored as codes 0, 1, 2"),
    "code 1 and 2 exchanged": ((0, 2, 1, 3), "-1, +1, 0 stored as codes 0, 1, 2"),
    "two's complement": ((1, 2, 3, 0), "0, +1, -1 stored as codes 0, 1, 3"),
}
"""Name -> the right code for each code in the file, and what it means."""
ORDERS: Mapping[str, str] = {
    "rows not permuted": "rows of Q or K in the checkpoint's order (rotated halves), which this architecture does "
    "not have",
    "rows permuted": "rows of Q or K reordered for adjacent RoPE pairs, which this architecture does not have",
    "rows permuted twice": "rows of Q or K reordered twice for adjacent RoPE pairs",
    "transposed": "rows and columns exchanged",
    "shape exchanged": "the stated shape has rows and columns exchanged; the values are as they should be",
}
THRESHOLDS: Mapping[str, str] = {
    "absmean in bfloat16": "quantised with the absmean rounded to bfloat16",
    "absmean in float16": "quantised with the absmean rounded to float16",
    "signs": "only the signs of the float weights, as llama-quantize makes of weights that are not ternary yet",
    "truncated": "quantised by truncation instead of rounding",
}
VALUES: Mapping[str, str] = {
    "plus one": "every value is 1 larger",
    "minus one": "every value is 1 smaller",
    "negative": "every value has the other sign",
    "all ones": "every value is 1: the weights were left out",
    "in bfloat16": "every value is rounded to bfloat16",
    "in float16": "every value is rounded to float16",
}
HOW: Mapping[str, str] = {
    **{layout.name: f"packed as {layout.sentence}" for layout in WRONG_LAYOUTS},
    **{name: sentence for name, (_, sentence) in TABLES.items()},
    **ORDERS,
    **THRESHOLDS,
    **VALUES,
}
"""Every deviation that can be established -> what it means."""


@dataclass(frozen=True)
class Target:
    """The codes of one matrix of the checkpoint."""

    digest: bytes
    histogram: Histogram


@dataclass
class Targets:
    """The codes of all matrices of the checkpoint, by GGUF name: digests only."""

    known: dict[str, Target] = field(default_factory=dict)

    def add(self, name: str, codes: Codes) -> None:
        """Remember a matrix."""
        self.known[name] = Target(_digest(codes), histogram_of(codes))

    def holding(self, codes: Codes) -> list[str]:
        """Return the names of the matrices with exactly these codes and this shape."""
        wanted = _digest(codes)
        return [name for name, target in self.known.items() if target.digest == wanted]


@dataclass(frozen=True)
class Stored:
    """A matrix as the file has it."""

    name: str
    shape: tuple[int, int]
    """As the file states it."""
    right_shape: tuple[int, int]
    packed: Codes | None
    """Bytes of an I2_S tensor, without the scale."""
    codes: Codes
    """Read as the type is defined."""
    n_heads: int | None
    """Q and K: number of heads."""
    permuted: bool
    """Whether the architecture has the rows of Q and K in another order than the checkpoint."""


def histogram_of(codes: Codes) -> Histogram:
    """Return how often each code occurs."""
    counts = np.bincount(codes.reshape(-1), minlength=4)
    return int(counts[0]), int(counts[1]), int(counts[2]), int(counts[3])


def find_matches(stored: Stored, targets: Targets) -> tuple[Match, ...]:
    """Return the simplest readings under which the matrix is one of the checkpoint's, all of the same simplicity.

    Simplicity: number of deviations; being another matrix is one. Up to two are tried. Layouts and
    orders keep the histogram, so that most readings need not be computed.
    """
    histogram = histogram_of(stored.codes)
    for n_deviations in (1, 2):
        found: set[Match] = set()
        for how, codes in _readings(stored, targets, histogram, n_deviations):
            names = targets.holding(codes)
            if len(how) == n_deviations:
                names = [name for name in names if name == stored.name]
            found.update(Match(name, how) for name in names)
        if found:
            return tuple(sorted(found))
    return ()


def _readings(
    stored: Stored, targets: Targets, histogram: Histogram, most: int
) -> Iterator[tuple[tuple[str, ...], Codes]]:
    """Yield the readings with ``most`` deviations, and those with one less, for which another matrix may count."""
    wanted = {target.histogram for target in targets.known.values()}
    layouts = (None, *WRONG_LAYOUTS) if stored.packed is not None else (None,)
    tables = [
        name
        for name in (None, *TABLES)
        if name is None or _recoded_histogram(histogram, TABLES[name][0]) in wanted
    ]
    tables = [name for name in tables if name is not None or histogram in wanted]
    for layout, table, order in itertools.product(layouts, tables, _orders(stored)):
        how = tuple(one for one in (None if layout is None else layout.name, table, order) if one is not None)
        if len(how) not in (most, most - 1):
            continue
        rows, cols = _read_as(stored, order)
        if layout is None:
            codes = stored.codes.reshape(rows, cols)
        else:
            if not layout.fits(rows) or stored.packed is None:
                continue
            codes = layout.unpack(stored.packed, rows, cols)
        if table is not None:
            codes = np.array(TABLES[table][0], np.uint8)[codes]
        yield how, _reorder(codes, order, stored.n_heads)


def _orders(stored: Stored) -> tuple[str | None, ...]:
    """Return the orders of rows and columns to try; of a matrix with another shape, what may have changed it."""
    if stored.shape != stored.right_shape:
        return ("transposed", "shape exchanged") if stored.shape == stored.right_shape[::-1] else ()
    if stored.n_heads is None:
        return None, "transposed"
    rows = ("rows not permuted", "rows permuted twice") if stored.permuted else ("rows permuted",)
    return None, "transposed", *rows


def _read_as(stored: Stored, order: str | None) -> tuple[int, int]:
    """Return rows and columns of the bytes: of a transposed matrix, those of its transpose."""
    return stored.right_shape[::-1] if order == "transposed" else stored.right_shape


def _reorder(codes: Codes, order: str | None, n_heads: int | None) -> Codes:
    """Return the rows in the order that is right, of a matrix that has them in another."""
    if order in (None, "shape exchanged"):
        return codes
    if order == "transposed":
        return np.ascontiguousarray(codes.T)
    assert n_heads is not None
    undo: Callable[[Codes, int], Codes] = permute if order == "rows not permuted" else unpermute
    return undo(codes, n_heads)


def _recoded_histogram(histogram: Histogram, table: tuple[int, int, int, int]) -> Histogram:
    counts = [0, 0, 0, 0]
    for code, right in enumerate(table):
        counts[right] += histogram[code]
    return counts[0], counts[1], counts[2], counts[3]


def _digest(codes: Codes) -> bytes:
    digest = hashlib.blake2b(str(codes.shape).encode(), digest_size=32)
    digest.update(np.ascontiguousarray(codes).data)
    return digest.digest()
