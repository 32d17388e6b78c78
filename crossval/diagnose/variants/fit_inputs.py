"""Inputs that do not count, and weights read from another place: found from the sums over blocks of inputs."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from crossval.diagnose.variants import layouts
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.fit import CLOSE, Fit, distance, probe, recorded_sums, settled
from crossval.diagnose.variants.fit_codes import table_words
from crossval.diagnose.variants.layouts import packed
from crossval.diagnose.variants.linear import input_scale, linear
from crossval.diagnose.variants.places import described
from crossval.diagnose.variants.variant import Variant
from crossval.diagnose.variants.weights import read_through
from crossval.model.kinds import IntArray, TernaryMatrix
from crossval.model.taps import BITLINEARS

# --- inputs that count as zero --------------------------------------------------------------------------------

How = Literal["sum", "weights", "input"]
HOW: tuple[How, ...] = ("sum", "weights", "input")
BLOCK = 32
MOST_EQUATIONS = 4096
OFFSETS = (1, 2, 0)
"""The activation sum is subtracted so often."""
N_SUMS = 64
"""Recorded sums that a stretch of inputs has to explain to be looked at."""
MIX = 1 << 16
"""They are mixed with random factors below this, so that one number stands for all."""


@dataclass(frozen=True)
class Lost:
    """Inputs that count as zero."""

    flags: Array
    how: How
    read: layouts.Layout = layouts.RIGHT
    offset: int = 1
    """What is subtracted from the codes 0, 1, 2."""

    @property
    def before(self) -> str:
        """What else is wrong."""
        parts = [self.read.name] if self.read.name else []
        if self.offset != 1:
            parts.append(table_words((-self.offset, 1 - self.offset, 2 - self.offset))[0])
        return "".join(f"{part}; " for part in parts)

    @property
    def group(self) -> str:
        """The symptom."""
        return f"{self.before}{self.words} count as zero"

    @property
    def words(self) -> str:
        """Which ones."""
        return described(self.flags, "input")

    @property
    def name(self) -> str:
        """One mechanism of several that may give the same values."""
        return (
            self.before
            + {
                "sum": f"{self.words} left out of the sums",
                "weights": f"weights of {self.words} read as zeros",
                "input": f"{self.words} not read",
            }[self.how]
        )

    @property
    def sentence(self) -> str:
        """The same at length."""
        return (
            self.before
            + {
                "sum": f"the sums leave out {self.words}; the quantiser sees all",
                "weights": f"the weights of {self.words} (columns of the matrix) are read as zeros",
                "input": f"{self.words} are not read, neither to quantise nor to sum",
            }[self.how]
        )


def without(context: Context, lost: Lost) -> Array:
    """Compute the output without some inputs."""
    if lost.flags.size != context.inputs[0].shape[-1]:
        raise Inapplicable
    rows_of = read_through(lost.read.codes_of, tuple(code - lost.offset for code in range(4)))
    if lost.how == "input":
        x = np.where(lost.flags, 0.0, context.inputs[0])
        return linear(context, x=x, scale=input_scale(context, x), rows_of=rows_of)
    codes, scale = context.quantized
    codes = np.where(lost.flags, np.float32(0), codes)
    return linear(context, codes=codes, scale=scale, rows_of=rows_of)


def _lost(context: Context) -> Iterator[Lost]:
    """Find a stretch of inputs that does not count, or is all that counts; else blocks that do not."""
    context = settled(context)
    codes, scale = context.quantized
    features = probe(context, max(N_SUMS // context.n_rows, 8))
    wanted = recorded_sums(context.sampled(features), scale)
    for layout in layouts.layouts(codes.shape[-1]):
        try:
            rows = layout.codes_of(context.matrix, features).astype(np.float32)
        except ValueError:
            continue
        for offset in OFFSETS:
            flags = _stretch(codes, rows - np.float32(offset), wanted)
            if flags is not None and flags.any() and not flags.all():
                yield Lost(flags, "sum", layout, offset)
                return
    flags = _blocks_lost(context)
    if flags is not None and flags.any() and not flags.all():
        yield Lost(flags, "sum")


def _stretch(codes: Array, rows: Array, wanted: Array) -> Array | None:
    """Look up the recorded sums among the differences of sums over the first inputs: exact, whole numbers.

    With P_j the sum over the inputs before j, inputs a to b are missing where P_b - P_a is what is missing.
    """
    token, feature = (at.reshape(-1)[:N_SUMS] for at in np.indices(wanted.shape))
    terms = codes[token] * rows[feature]
    mixed = np.random.default_rng(0).integers(1, MIX, token.size).astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(mixed @ terms)])
    total, sums = before[-1], float(mixed @ np.rint(wanted[token, feature]))
    order = np.argsort(before, kind="stable")
    best: tuple[int, int, int, bool] | None = None
    for missing, value in ((True, total - sums), (False, sums)):
        wanted_ends = before + value
        first = np.searchsorted(before[order], wanted_ends)
        last = np.searchsorted(before[order], wanted_ends, side="right")
        for start in np.flatnonzero(last > first).tolist():
            for stop in order[first[start] : last[start]].tolist():
                if stop > start:
                    found = (_roundness(start) + _roundness(stop), start, stop, missing)
                    best = found if best is None else max(best, found)
    if best is None:
        return None
    _, start, stop, missing = best
    at = np.arange(codes.shape[-1])
    inside: Array = (at >= start) & (at < stop)
    return inside if missing else ~inside


def _roundness(n: int) -> int:
    """Return how often two divides a boundary: of several that no value tells apart, the roundest is said."""
    return (n & -n).bit_length() if n else 32


def _blocks_lost(context: Context) -> Array | None:
    """Fit how much each block of inputs counts."""
    codes, scale = context.quantized
    n_blocks = codes.shape[-1] // BLOCK
    n_features = min(max(4 * n_blocks // context.n_rows, 64), MOST_EQUATIONS)
    features = probe(context, n_features)
    wanted = recorded_sums(context.sampled(features), scale)
    rows = context.matrix.signs[features]
    if wanted.size < 2 * n_blocks:
        return None
    terms = np.empty((context.n_rows, features.size, n_blocks))
    for b in range(n_blocks):
        at = slice(b * BLOCK, (b + 1) * BLOCK)
        terms[..., b] = codes[:, at] @ rows[:, at].T
    share = np.repeat(_solve(terms.reshape(-1, n_blocks), wanted.reshape(-1)), BLOCK)
    flags: Array = share < 0.5
    return flags if distance(wanted, (codes * ~flags) @ rows.T) < CLOSE else None


def _solve(terms: Array, wanted: Array) -> Array:
    """Least squares by the normal equations; columns of zeros get 1 (their inputs cannot be told)."""
    gram = terms.T @ terms
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1.0
    right = terms.T @ wanted
    right[dead] = 1.0
    try:
        return np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:
        raise Inapplicable from None


def _each_how(context: Context) -> Iterator[Lost]:
    return (replace(lost, how=how) for lost in _lost(context) for how in HOW)


# --- weights of another place ---------------------------------------------------------------------------------

N_PROBED = 24
MOST_BLOCKS = 64


@dataclass(frozen=True)
class _Moved:
    how: Literal["tensor", "row around", "row zero", "block"]
    by: int
    block: int = 0
    size: int = 128


_ENDS = (
    ("tensor", "tensor", "of the tensor"),
    ("row zero", "row, zeros beyond it", "of its row, zero beyond its ends"),
)


def _places(context: Context) -> Iterator[Fit]:
    """Find a constant distance between where weights are and where they are read."""
    context = settled(context)
    features = probe(context, N_PROBED)
    codes, scale = context.quantized
    wanted = recorded_sums(context.sampled(features), scale)
    token = int(np.argmax(np.linalg.norm(wanted, axis=-1)))
    x, target = codes[token].astype(np.float64), wanted[token]
    size = float(np.linalg.norm(target))
    signs = context.matrix.signs
    cols = signs.shape[1]
    length = 1 << int(np.ceil(np.log2(4 * cols)))
    spectrum = np.conj(np.fft.rfft(x, length))
    flat = signs.reshape(-1)
    off = {how: np.zeros(2 * cols + 1) for how in ("tensor", "row zero")}
    around = np.zeros(cols)
    for i, feature in enumerate(features):
        window = np.zeros(3 * cols)  # the row before, the row, the row after; nothing outside of the tensor
        first = (int(feature) - 1) * cols
        have = slice(max(first, 0), min(first + 3 * cols, flat.size))
        window[have.start - first : have.stop - first] = flat[have]
        found = np.fft.irfft(np.fft.rfft(window, length) * spectrum, length)[: 2 * cols + 1]
        off["tensor"] += (np.rint(found) - target[i]) ** 2
        window[:cols] = window[2 * cols :] = 0.0
        found = np.fft.irfft(np.fft.rfft(window, length) * spectrum, length)[: 2 * cols + 1]
        off["row zero"] += (np.rint(found) - target[i]) ** 2
        own = np.fft.irfft(np.fft.rfft(signs[feature].astype(np.float64)) * np.conj(np.fft.rfft(x)), cols)
        around += (np.rint(own) - target[i]) ** 2
    for by in np.flatnonzero(np.sqrt(around) < CLOSE * size).tolist():
        if by:
            by = by if by <= cols // 2 else by - cols
            yield Fit(
                f"weights shifted by {by:+d} within each row",
                f"input j is multiplied with the weight of input j{by:+d} of its row, counted around the end",
                _Moved("row around", by),
            )
    for how, what, where in _ENDS:
        for place in np.flatnonzero(np.sqrt(off[how]) < CLOSE * size).tolist():
            if by := place - cols:
                yield Fit(
                    f"weights shifted by {by:+d} within the {what}",
                    f"input j is multiplied with the weight {by:+d} places further {where}",
                    _Moved(how, by),  # type: ignore[arg-type]
                )
    yield from _blocks(context)


def _blocks(context: Context) -> Iterator[Fit]:
    """Find one block of inputs that is multiplied with the weights of another."""
    cols = context.inputs[0].shape[-1]
    context = settled(context)
    features = probe(context, N_PROBED)
    codes, scale = context.quantized
    wanted = recorded_sums(context.sampled(features), scale)
    rows = context.matrix.signs[features]
    left = wanted - codes @ rows.T
    size = float(np.linalg.norm(wanted))
    for block in (128, 32, 64):
        n = cols // block
        if cols % block or not 2 <= n <= MOST_BLOCKS:
            continue
        x, w = codes.reshape(-1, n, block), rows.reshape(-1, n, block)
        pairs = np.einsum("tbk,fck->bctf", x, w, optimize=True)
        own = pairs[np.arange(n), np.arange(n)]
        off = np.sqrt(((pairs - own[:, None] - left) ** 2).sum(axis=(2, 3)))
        for b, other in zip(*np.nonzero(off < CLOSE * size), strict=True):
            if b != other:
                yield Fit(
                    f"block {b} of {block} inputs multiplied with the weights of block {other}",
                    f"inputs {b * block} to {(b + 1) * block} are multiplied with the weights of block {other}",
                    _Moved("block", int(other), int(b), block),
                )


def _moved(context: Context, fit: Fit) -> Array:
    moved: _Moved = fit.data

    def rows_of(matrix: TernaryMatrix, features: IntArray) -> Array:
        n_rows, cols = matrix.signs.shape
        if moved.how == "row around":
            return np.roll(matrix.signs[features], -moved.by, axis=-1)
        if moved.how == "block":
            rows = matrix.signs[features].copy()
            at = slice(moved.block * moved.size, (moved.block + 1) * moved.size)
            rows[:, at] = matrix.signs[features, moved.by * moved.size : (moved.by + 1) * moved.size]
            return rows
        place = np.arange(cols) + moved.by
        if moved.how == "row zero":
            inside = (place >= 0) & (place < cols)
            return np.where(inside, matrix.signs[features][:, np.clip(place, 0, cols - 1)], np.float32(0))
        place = features[:, None] * cols + place
        inside = (place >= 0) & (place < n_rows * cols)
        flat = matrix.signs.reshape(-1)
        return np.where(inside, flat[np.clip(place, 0, flat.size - 1)], np.float32(0))

    return linear(context, rows_of=rows_of)


# --- bytes as weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bytes:
    signed: bool
    offset: float
    factor: float


def _bytes_used(context: Context) -> Iterator[Fit]:
    """Fit packed bytes used as int8 weights of the first quarter of the inputs, up to an offset."""
    context = settled(context)
    features = probe(context, N_PROBED)
    codes, scale = context.quantized
    wanted = recorded_sums(context.sampled(features), scale)
    data = packed(context.matrix.signs[features])
    quarter = codes[:, : data.shape[1]].astype(np.float64)
    total = np.broadcast_to(quarter.sum(axis=-1, keepdims=True), wanted.shape)
    for signed in (True, False):
        values = (data.view(np.int8) if signed else data).astype(np.float64)
        terms = np.stack([(quarter @ values.T).reshape(-1), total.reshape(-1)], axis=-1)
        solution, *_ = np.linalg.lstsq(terms, wanted.reshape(-1), rcond=None)
        if distance(wanted.reshape(-1), terms @ solution) < CLOSE and abs(solution[0] - 1) < CLOSE:
            offset = float(np.rint(solution[1]))
            sign = "signed" if signed else "unsigned"
            name = f"packed bytes used as weights ({sign}{f', {offset:+g}' if offset else ''})"
            said = f"each row's packed bytes are used as {sign} weights of the first quarter of the inputs"
            yield Fit(name, said, _Bytes(signed, offset, 1.0))


def _of_bytes(context: Context, fit: Fit) -> Array:
    used: _Bytes = fit.data
    codes, scale = context.quantized

    def rows_of(matrix: TernaryMatrix, features: IntArray) -> Array:
        data = packed(matrix.signs[features])
        values = (data.view(np.int8) if used.signed else data).astype(np.float64) + used.offset
        return np.concatenate([values, np.zeros((values.shape[0], 3 * values.shape[1]))], axis=-1)

    return linear(context, codes=codes.astype(np.float64), scale=scale, rows_of=rows_of)


FITTED = (
    Variant(
        "{0.name}",
        15,
        BITLINEARS,
        "{0.sentence}",
        without,
        _each_how,
        group="{0.group}",
        shown="inputs *a* to *b* left out of the sums; their weights read as zeros; inputs not read",
        shown_sentence="some inputs count as zero: how much each block counts is fitted by least squares",
    ),
    Variant(
        "{0.name}",
        3,
        BITLINEARS,
        "{0.sentence}",
        _moved,
        _places,
        group="weights shifted",
        shown="weights shifted by *n* within each row or the tensor; block *a* multiplied with the weights of *b*",
        shown_sentence="weights are read from another place, by any distance; one block of inputs meets another's",
    ),
    Variant(
        "{0.name}",
        2,
        BITLINEARS,
        "{0.sentence}",
        _of_bytes,
        _bytes_used,
        shown="packed bytes used as weights",
        shown_sentence="each row's packed bytes are weights of the first quarter of the inputs, plus an offset",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
