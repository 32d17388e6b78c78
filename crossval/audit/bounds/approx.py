"""How rounding errors travel through several operations whose results an engine did not record.

A *segment* is a run of operations between recorded tensors. The specification computes it in float64, and beside
every value an elementwise bound on how far a correct engine's value may be from it, to first order: what the
inputs may be off by, carried through the operation, plus the operation's own roundings.

Two things keep these bounds near the rounding level, whatever the length of a segment. A quantiser and a rounding
to binary16 *reset* the error: the codes are equal unless a value lies so near a tie that its error reaches across.
And an error that all values of a token share as one factor (the reciprocal root of a norm, the step size of a
quantiser) is carried apart, because the next norm or quantiser divides it out again.

Errors come in three kinds. *Noise*: roundings of different elements are independent and point either way, so in
sums they add as squares; a bound is ``SIGMAS`` standard deviations. (A worst case carried through every dot
product would grow by a factor of forty in each attention.)
The few roundings of one element may all point one way: they are added up. *Jumps*: a value that may lie on the
other side of a binary16 tie moves by a whole step. Jumps of different values add as squares, too, but what one of
them moves it moves together, so that they do not average out in a norm; ``JUMPS`` steps are allowed for each,
because a few may all point one way. *Shared*: see above.

Sums are bounded as they are likely to round, too: a sum of ``n`` terms passes through
partial sums of about ``norm(terms) * sqrt(k / n)``, each rounded by at most ``U`` of itself with errors of either
sign, which adds up to a standard deviation of ``U * norm(terms) * sqrt(n / 6)``; of terms of one sign to
``U * sum * sqrt(n) / 3``. ``SIGMAS`` times that is allowed (N. Higham, T. Mary, "A new approach to probabilistic
rounding error analysis", SIAM J. Sci. Comput. 41, 2019: in float32 the signs behave as if they were independent).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from crossval.audit.bounds.arithmetic import Arithmetic, Array, Rounding, U
from crossval.audit.bounds.quantised import QUANTISERS, moved
from crossval.formats import F32, FORMATS
from crossval.model.kinds import FloatArray

SIGMAS = 8.0
RANDOM_SIGNS = SIGMAS / math.sqrt(6.0)
"""Times ``U * sqrt(n)`` and the norm of the terms: a sum of terms of either sign."""
ONE_SIGN = SIGMAS / 3.0
"""Times ``U * sqrt(n)`` and the sum: terms of one sign."""
JUMPS = 2.0
"""Steps of binary16 that a value near a tie counts for: two jumps of one size and sign are twice one."""


@dataclass(frozen=True)
class Approx:
    """Values and how far a correct engine's may be from them. Axis 0 counts tokens, but for scores."""

    value: Array
    """float64; token ids and positions: integers."""
    noise: FloatArray
    """Independent errors, elementwise; shaped as ``value``."""
    jump: FloatArray
    """Errors that the elements of a token may have together; shaped as ``value``."""
    shared: FloatArray
    """Relative difference that all values of a token have in common, ``(n_tokens,)``; of scores zero."""

    @property
    def error(self) -> FloatArray:
        """Largest difference, elementwise, but for what is shared."""
        found: FloatArray = self.noise + self.jump
        return found

    @property
    def total(self) -> FloatArray:
        """Largest difference, elementwise."""
        return self.error + self.common

    @property
    def common(self) -> FloatArray:
        """The shared error, elementwise."""
        if not self.shared.any():
            return np.zeros_like(self.noise)
        with np.errstate(over="ignore", invalid="ignore"):
            found: FloatArray = np.abs(self.value) * self.shared.reshape(-1, *[1] * (self.value.ndim - 1))
        return found

    def rows(self, index: Sequence[int] | npt.NDArray[np.intp], axis: int) -> Approx:
        """Return some of the tokens."""
        value, noise, jump = (np.take(array, index, axis=axis) for array in (self.value, self.noise, self.jump))
        return Approx(value, noise, jump, self.shared if axis else np.take(self.shared, index))

    def with_rows(self, index: Sequence[int], new: Approx) -> Approx:
        """Return these values with some of the tokens replaced."""
        arrays = [array.copy() for array in self._arrays()]
        for array, replaced in zip(arrays, new._arrays(), strict=True):
            array[index] = replaced
        return Approx(*arrays)

    def _arrays(self) -> tuple[Array, ...]:
        return self.value, self.noise, self.jump, self.shared


def joined(first: Approx, *others: Approx) -> Approx:
    """Concatenate tokens."""
    return Approx(
        *(np.concatenate(arrays) for arrays in zip(*(x._arrays() for x in (first, *others)), strict=True))
    )


@dataclass(frozen=True)
class Ties:
    """The activations of a quantised tensor that a correct engine may round to either side."""

    rows: npt.NDArray[np.intp]
    """Row of the pass of each, ``(n_ties,)``."""
    features: npt.NDArray[np.intp]
    nearness: FloatArray
    """Distance to the tie over the largest that is possible: 0 on the tie, 1 just within reach."""


Flips = Mapping[tuple[str, int], frozenset[int]]
"""(quantised tap, row of the pass) -> features that are rounded to the other side of their tie."""


def exact(array: Array) -> Approx:
    """Wrap values that an engine has exactly as recorded; floats are widened to float64."""
    wide = array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array
    nothing = np.zeros(array.shape)
    return Approx(wide, nothing, nothing, np.zeros(array.shape[:1]))


def recorded(array: Array, arithmetic: Arithmetic) -> Approx:
    """Wrap recorded values: an engine of unknown arithmetic may have carried more digits than it recorded.

    One that computes in a 16-bit format had what it recorded.
    """
    found, form = exact(array), arithmetic.recorded
    if array.dtype.kind != "f" or (form is F32 and (arithmetic.known or arithmetic.low)):
        return found
    return replace(found, noise=form.unit_roundoff * np.abs(found.value) + (0.0 if form is F32 else form.tiny))


def round_to(rounding: Rounding | None, x: Approx) -> Approx:
    """Round to a 16-bit format, or quantise: equal, unless the error reaches across a tie. None: leave it."""
    if rounding is None:
        return x
    if rounding in QUANTISERS:  # what the values of a token share stays one factor of its codes' steps
        jump = JUMPS * moved(x.value, x.total, rounding)
        return Approx(QUANTISERS[rounding](x.value), np.zeros_like(x.noise), jump, x.shared)
    rounded, total = FORMATS[rounding].round, x.total
    value = rounded(x.value)
    step = np.maximum(np.abs(rounded(x.value + total) - value), np.abs(rounded(x.value - total) - value))
    return Approx(value, np.zeros_like(value), JUMPS * step, np.zeros_like(x.shared))


def random_sum(n: int, length: Array, result: Array, arithmetic: Arithmetic) -> FloatArray:
    """Return the likely error of sums of ``n`` terms of either sign; ``length`` is the norm of the terms."""
    n = max(1, math.ceil(arithmetic.sum_steps(n)))
    allowed: FloatArray = RANDOM_SIGNS * math.sqrt(n) * U * (length + np.abs(result))
    return allowed
