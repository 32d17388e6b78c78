"""Inputs that count as zero, and weights read from another place: found from sums over blocks of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from crossval.diagnose.variants import layouts
from crossval.diagnose.variants.context import Array, Context, Inapplicable, RowsOf, input_scale, linear, product
from crossval.diagnose.variants.estimate import CLOSE, Fit, distance, fitted, probe, recorded_sums, settled
from crossval.diagnose.variants.layouts import packed
from crossval.diagnose.variants.places import described
from crossval.diagnose.variants.weights import read_through, table_words
from crossval.model.kinds import IntArray, TernaryMatrix
from crossval.model.taps import BITLINEARS

N_PROBED = 24
"""Number of output features sampled."""
N_SUMS = 64
"""Number of recorded sums that a range of inputs has to explain to be considered."""
MIX = 1 << 16
"""The sums are combined with random factors below this, so that one number represents all."""
MOST_EQUATIONS = 4096
MOST_BLOCKS = 64
BLOCK = 32
OFFSETS = (1, 2, 0)
"""How many times the activation sum is subtracted."""


@dataclass(frozen=True)
class _Probe:
    """Some sums of a product: the factors and the recorded results."""

    context: Context
    features: IntArray
    codes: Array
    """``(n_rows, cols)``."""
    wanted: Array
    """Recorded sums, ``(n_rows, features)``."""

    @property
    def rows(self) -> Array:
        """Rows of the matrix, ``(features, cols)``."""
        return self.context.matrix.signs[self.features]


def _probe(context: Context, n_features: Callable[[Context], int] = lambda context: N_PROBED) -> _Probe:
    context = settled(context)
    features = probe(context, n_features(context))
    codes, scale = context.quantized
    return _Probe(context, features, codes, recorded_sums(context.sampled(features), scale))


# --- inputs that count as zero --------------------------------------------------------------------------------

How = Literal["sum", "weights", "input"]
NAMES: dict[How, tuple[str, str]] = {
    "sum": ("{} left out of the sums", "the sums leave out {}; the quantiser sees all"),
    "weights": ("weights of {} read as zeros", "the weights of {} (columns of the matrix) are read as zeros"),
    "input": ("{} not read", "{} are not read, neither to quantise nor to sum"),
}
"""Mechanisms that may give the same values: name and sentence."""


def _fits(flags: Array | None, layout: layouts.Layout = layouts.RIGHT, offset: int = 1) -> Iterator[Fit]:
    """Yield the ways in which some inputs count as zero; ``offset`` is subtracted from the codes 0, 1, 2."""
    if flags is None or flags.all() or not flags.any():
        return
    parts = [layout.name] if layout.name else []
    if offset != 1:
        parts.append(table_words((-offset, 1 - offset, 2 - offset))[0])
    before, words = "".join(f"{part}; " for part in parts), described(flags, "input")
    rows_of = read_through(layout.codes_of, tuple(code - offset for code in range(4)))
    for how, (name, said) in NAMES.items():
        formula = partial(_without, flags, how, rows_of)
        group = f"{before}{words} count as zero"
        yield Fit(before + name.format(words), formula, before + said.format(words), group)


def _without(flags: Array, how: How, rows_of: RowsOf, context: Context) -> Array:
    """Compute the output without some inputs."""
    if flags.size != context.inputs[0].shape[-1]:
        raise Inapplicable
    if how == "input":
        x = np.where(flags, 0.0, context.inputs[0])
        return linear(context, x=x, scale=input_scale(context, x), rows_of=rows_of)
    codes, scale = context.quantized
    return linear(context, codes=np.where(flags, np.float32(0), codes), scale=scale, rows_of=rows_of)


def _lost(context: Context) -> Iterator[Fit]:
    """Find a range of inputs that counts as zero, or alone counts; otherwise blocks that count as zero."""
    seen = _probe(context, lambda c: max(N_SUMS // c.n_rows, 8))
    for layout in layouts.layouts(seen.codes.shape[-1]):
        try:
            rows = layout.codes_of(seen.context.matrix, seen.features).astype(np.float32)
        except ValueError:
            continue
        for offset in OFFSETS:
            flags = _stretch(seen.codes, rows - np.float32(offset), seen.wanted)
            found = list(_fits(flags, layout, offset))
            if found:
                yield from found
                return
    yield from _fits(_blocks_lost(seen.context))


def _stretch(codes: Array, rows: Array, wanted: Array) -> Array | None:
    """Look up the recorded sums among the differences of prefix sums, which are exact integers.

    With P_j the sum over the inputs before j, inputs a to b are missing if P_b - P_a is the missing amount.
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
    """Return how often two divides a boundary: of several that values cannot tell apart, the roundest is named."""
    return (n & -n).bit_length() if n else 32


def _blocks_lost(context: Context) -> Array | None:
    """Fit how much each block of inputs counts."""
    n_blocks = context.inputs[0].shape[-1] // BLOCK
    seen = _probe(context, lambda c: min(max(4 * n_blocks // c.n_rows, 64), MOST_EQUATIONS))
    codes, rows, wanted = seen.codes, seen.rows, seen.wanted
    if wanted.size < 2 * n_blocks:
        return None
    terms = np.empty((*wanted.shape, n_blocks))
    for b in range(n_blocks):
        at = slice(b * BLOCK, (b + 1) * BLOCK)
        terms[..., b] = codes[:, at] @ rows[:, at].T
    share = np.repeat(_solve(terms.reshape(-1, n_blocks), wanted.reshape(-1)), BLOCK)
    flags: Array = share < 0.5
    return flags if distance(wanted, (codes * ~flags) @ rows.T) < CLOSE else None


def _solve(terms: Array, wanted: Array) -> Array:
    """Least squares by the normal equations; columns of zeros get 1 (their inputs cannot be determined)."""
    gram = terms.T @ terms
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1.0
    right = terms.T @ wanted
    right[dead] = 1.0
    try:
        return np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:
        raise Inapplicable from None


# --- products left out, or with other inputs --------------------------------------------------------------
#
# Kernels multiply with the codes 0, 1, 2 and subtract the sum of all activations: the products may go wrong while
# that sum is right.


def _codes_lost(context: Context) -> Iterator[Fit]:
    """Find a range of inputs whose products are left out, but not their share of the activation sum."""
    seen = _probe(context, lambda c: max(N_SUMS // c.n_rows, 8))
    flags = _stretch(seen.codes, seen.rows + 1, seen.wanted + seen.codes.sum(axis=-1, keepdims=True))
    if flags is not None and flags.any() and not flags.all():
        words = described(flags, "input")
        yield _reading(
            partial(_as_minus_one, flags),
            f"products of {words} left out, not their activation sum",
            f"the products of {words} with the codes 0, 1, 2 are left out, the activation sum that is subtracted "
            "has them: their weights count as -1",
        )


def _as_minus_one(flags: Array, matrix: TernaryMatrix, features: IntArray) -> Array:
    return np.where(flags, np.float32(-1), matrix.signs[features])


def _strides(context: Context) -> Iterator[Fit]:
    """Find a quarter of every block of 128 that meets the inputs, or the weights, of another quarter."""
    seen = _probe(context)
    left = seen.wanted - seen.codes @ seen.rows.T
    limit = CLOSE * float(np.linalg.norm(seen.wanted))
    x, w = (one.reshape(len(one), -1, 4, BLOCK) for one in (seen.codes, seen.rows))
    for a in range(4):
        for b in range(4):
            moved = np.einsum("tnk,fnk->tf", x[:, :, b] - x[:, :, a], w[:, :, a] + 1, optimize=True)
            if a != b and np.linalg.norm(moved - left) < limit:
                yield Fit(
                    f"quarter {a} of each block with the inputs of quarter {b}",
                    partial(_of_other_inputs, a, b),
                    f"of each block of 128, weights {_quarter(a)} are multiplied with inputs {_quarter(b)}; the "
                    "activation sum that is subtracted is right",
                )
            moved = np.einsum("tnk,fnk->tf", x[:, :, a], w[:, :, b] - w[:, :, a], optimize=True)
            if a != b and np.linalg.norm(moved - left) < limit:
                yield _reading(
                    partial(_of_other_weights, a, b),
                    f"quarter {a} of each block with the weights of quarter {b}",
                    f"of each block of 128, inputs {_quarter(a)} are multiplied with weights {_quarter(b)}",
                )


def _quarter(index: int) -> str:
    return f"{index * BLOCK} to {(index + 1) * BLOCK} (exclusive)"


def _in_quarters(values: Array, a: int, b: int) -> Array:
    """Return values ``(rows, cols)`` with quarter ``a`` of each block of 128 replaced by quarter ``b``."""
    blocks = values.reshape(len(values), -1, 4, BLOCK).copy()
    blocks[:, :, a] = blocks[:, :, b]
    return blocks.reshape(values.shape)


def _of_other_inputs(a: int, b: int, context: Context) -> Array:
    def dot(codes: Array, rows: Array) -> Array:
        return product(_in_quarters(codes, a, b), rows + 1) - codes.sum(axis=-1, keepdims=True)

    return linear(context, dot=dot)


def _of_other_weights(a: int, b: int, matrix: TernaryMatrix, features: IntArray) -> Array:
    return _in_quarters(matrix.signs[features], a, b)


# --- weights of another place ---------------------------------------------------------------------------------


def _reading(rows_of: RowsOf, name: str, sentence: str) -> Fit:
    return Fit(name, lambda c: linear(c, rows_of=rows_of), sentence)


def _places(context: Context) -> Iterator[Fit]:
    """Find a constant distance between where weights are and where they are read."""
    seen = _probe(context)
    token = int(np.argmax(np.linalg.norm(seen.wanted, axis=-1)))
    x, target = seen.codes[token].astype(np.float64), seen.wanted[token]
    limit = CLOSE * float(np.linalg.norm(target))
    signs = seen.context.matrix.signs
    cols = signs.shape[1]
    length = 1 << int(np.ceil(np.log2(4 * cols)))
    spectrum = np.conj(np.fft.rfft(x, length))
    flat = signs.reshape(-1)
    tensor, row_only, around = np.zeros(2 * cols + 1), np.zeros(2 * cols + 1), np.zeros(cols)
    for i, feature in enumerate(seen.features):
        window = np.zeros(3 * cols)  # the row before, the row, the row after; nothing outside of the tensor
        first = (int(feature) - 1) * cols
        have = slice(max(first, 0), min(first + 3 * cols, flat.size))
        window[have.start - first : have.stop - first] = flat[have]
        found = np.fft.irfft(np.fft.rfft(window, length) * spectrum, length)[: 2 * cols + 1]
        tensor += (np.rint(found) - target[i]) ** 2
        window[:cols] = window[2 * cols :] = 0.0
        found = np.fft.irfft(np.fft.rfft(window, length) * spectrum, length)[: 2 * cols + 1]
        row_only += (np.rint(found) - target[i]) ** 2
        own = np.fft.irfft(np.fft.rfft(signs[feature].astype(np.float64)) * np.conj(np.fft.rfft(x)), cols)
        around += (np.rint(own) - target[i]) ** 2
    for by in np.flatnonzero(np.sqrt(around) < limit).tolist():
        if by:
            by = by if by <= cols // 2 else by - cols
            yield _reading(
                partial(_around, by),
                f"weights shifted by {by:+d} within each row",
                f"input j is multiplied with the weight of input j{by:+d} of its row, counted around the end",
            )
    for off, read, what, where in (
        (tensor, _along_tensor, "tensor", "of the tensor"),
        (row_only, _along_row, "row, zeros beyond it", "of its row, zero beyond its ends"),
    ):
        for place in np.flatnonzero(np.sqrt(off) < limit).tolist():
            if by := place - cols:
                yield _reading(
                    partial(read, by),
                    f"weights shifted by {by:+d} within the {what}",
                    f"input j is multiplied with the weight {by:+d} places further {where}",
                )
    yield from _blocks(context)


def _around(by: int, matrix: TernaryMatrix, features: IntArray) -> Array:
    return np.roll(matrix.signs[features], -by, axis=-1)


def _along_row(by: int, matrix: TernaryMatrix, features: IntArray) -> Array:
    cols = matrix.signs.shape[1]
    place = np.arange(cols) + by
    inside = (place >= 0) & (place < cols)
    return np.where(inside, matrix.signs[features][:, np.clip(place, 0, cols - 1)], np.float32(0))


def _along_tensor(by: int, matrix: TernaryMatrix, features: IntArray) -> Array:
    flat, cols = matrix.signs.reshape(-1), matrix.signs.shape[1]
    place = features[:, None] * cols + np.arange(cols) + by
    return np.where((place >= 0) & (place < flat.size), flat[np.clip(place, 0, flat.size - 1)], np.float32(0))


def _blocks(context: Context) -> Iterator[Fit]:
    """Find one block of inputs that is multiplied with the weights of another."""
    cols = context.inputs[0].shape[-1]
    seen = _probe(context)
    codes, rows = seen.codes, seen.rows
    left = seen.wanted - codes @ rows.T
    limit = CLOSE * float(np.linalg.norm(seen.wanted))
    for block in (128, 32, 64):
        n = cols // block
        if cols % block or not 2 <= n <= MOST_BLOCKS:
            continue
        x, w = codes.reshape(-1, n, block), rows.reshape(-1, n, block)
        pairs = np.einsum("tbk,fck->bctf", x, w, optimize=True)
        own = pairs[np.arange(n), np.arange(n)]
        off = np.sqrt(((pairs - own[:, None] - left) ** 2).sum(axis=(2, 3)))
        for b, other in zip(*np.nonzero(off < limit), strict=True):
            if b != other:
                yield _reading(
                    partial(_of_block, block, int(b), int(other)),
                    f"block {b} of {block} inputs multiplied with the weights of block {other}",
                    f"inputs {b * block} to {(b + 1) * block} are multiplied with the weights of block {other}",
                )


def _of_block(size: int, block: int, other: int, matrix: TernaryMatrix, features: IntArray) -> Array:
    rows = matrix.signs[features].copy()
    rows[:, block * size : (block + 1) * size] = rows[:, other * size : (other + 1) * size].copy()
    return rows


# --- bytes as weights -----------------------------------------------------------------------------------------


def _bytes_used(context: Context) -> Iterator[Fit]:
    """Fit packed bytes used as int8 weights of the first quarter of the inputs, up to an offset."""
    seen = _probe(context)
    data = packed(seen.rows)
    quarter = seen.codes[:, : data.shape[1]].astype(np.float64)
    wanted = seen.wanted.reshape(-1)
    total = np.broadcast_to(quarter.sum(axis=-1, keepdims=True), seen.wanted.shape)
    for sign, dtype in (("signed", np.int8), ("unsigned", np.uint8)):
        values = data.view(dtype).astype(np.float64)
        terms = np.stack([(quarter @ values.T).reshape(-1), total.reshape(-1)], axis=-1)
        solution, *_ = np.linalg.lstsq(terms, wanted, rcond=None)
        if distance(wanted, terms @ solution) < CLOSE and abs(solution[0] - 1) < CLOSE:
            offset = float(np.rint(solution[1]))
            yield Fit(
                f"packed bytes used as weights ({sign}{f', {offset:+g}' if offset else ''})",
                partial(_of_bytes, dtype, offset),
                f"each row's packed bytes are used as {sign} weights of the first quarter of the inputs",
            )


def _of_bytes(dtype: type[np.int8] | type[np.uint8], offset: float, context: Context) -> Array:
    codes, scale = context.quantized

    def rows_of(matrix: TernaryMatrix, features: IntArray) -> Array:
        values = packed(matrix.signs[features]).view(dtype).astype(np.float64) + offset
        return np.concatenate([values, np.zeros((values.shape[0], 3 * values.shape[1]))], axis=-1)

    return linear(context, codes=codes.astype(np.float64), scale=scale, rows_of=rows_of)


# fmt: off
FITTED = (
    fitted("{}", "{0.sentence}", _lost, group="{0.group}", family=15, ops=BITLINEARS,
        shown="inputs *a* to *b* left out of the sums; their weights read as zeros; inputs not read",
        shown_sentence="some inputs count as zero: how much each block counts is fitted by least squares"),
    fitted("{}", "{0.sentence}", _places, group="weights shifted", family=3, ops=BITLINEARS,
        shown="weights shifted by *n* within each row or the tensor; block *a* multiplied with the weights of *b*",
        shown_sentence="weights are read from another place, by any distance; "
        "one block of inputs is multiplied by another's"),
    fitted("{}", "{0.sentence}", _codes_lost, family=15, ops=BITLINEARS,
        shown="products of inputs *a* to *b* left out, not their activation sum",
        shown_sentence="products with the codes 0, 1, 2 are left out, the whole activation sum is subtracted"),
    fitted("{}", "{0.sentence}", _strides, group="quarters of blocks", family=3, ops=BITLINEARS,
        shown="quarter *a* of each block with the inputs of quarter *b*, or with its weights",
        shown_sentence="a quarter of each block of 128 is multiplied with the inputs, or the weights, of another"),
    fitted("{}", "{0.sentence}", _bytes_used, family=2, ops=BITLINEARS, shown="packed bytes used as weights",
        shown_sentence="each row's packed bytes are weights of the first quarter of the inputs, plus an offset"),
)
# fmt: on
"""Tried when nothing simpler explains a matrix product."""
