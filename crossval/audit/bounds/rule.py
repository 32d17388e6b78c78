"""What every kind of operation has to say about rounding, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from crossval.audit.bounds.approx import Approx
from crossval.audit.bounds.arithmetic import SECOND_ORDER, TINY, Arithmetic, Array, Reading, U
from crossval.formats import F32, Format
from crossval.model.kinds import FloatArray, Kind

K = TypeVar("K", bound=Kind)


class Rule(ABC, Generic[K]):
    """How one kind of operation rounds. Arrays are float64, as the reading has them; bounds are elementwise."""

    def readings(
        self, kind: K, n_inputs: int, arithmetic: Arithmetic, n_tokens: int, n_rows: int
    ) -> tuple[Reading, ...]:
        """Return the allowed readings: no input is rounded, unless the kind says otherwise."""
        return (Reading("", (None,) * n_inputs),)

    @abstractmethod
    def bound(
        self, kind: K, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], a: Arithmetic
    ) -> FloatArray:
        """Return the largest allowed ``|recorded - expected|``."""

    @abstractmethod
    def propagate(self, kind: K, inputs: Sequence[Approx], weights: Sequence[Any], a: Arithmetic) -> Approx:
        """Compute the operation in binary32 with its error, from inputs with errors of their own (``approx``)."""


class PartsRule(Rule[K]):
    """A rule whose bound is that of the engine's format, and more where less was recorded than it had."""

    def bound(
        self, kind: K, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], a: Arithmetic
    ) -> FloatArray:
        """Return the largest allowed difference."""
        allowed = (self.low if a.low else self.single)(kind, inputs, expected, a)
        form = a.recorded
        if form is F32:
            return allowed
        rounded = form.unit_roundoff * np.abs(expected) + form.tiny
        return allowed + (self.input_error(kind, inputs, expected, form) + rounded) * SECOND_ORDER

    @abstractmethod
    def single(self, kind: K, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Return the bound in binary32, for inputs that the engine had as they were recorded."""

    @abstractmethod
    def low(self, kind: K, inputs: Sequence[Array], expected: FloatArray, a: Arithmetic) -> FloatArray:
        """Return the same for an engine that computes in a 16-bit format."""

    @abstractmethod
    def input_error(self, kind: K, inputs: Sequence[Array], expected: FloatArray, form: Format) -> FloatArray:
        """Return what one rounding of every input to a format may change of the output; first order."""


def rounded(array: Array, form: Format) -> FloatArray:
    """Return what one rounding to a format may change of an array."""
    changed: FloatArray = form.unit_roundoff * np.abs(array) + form.tiny
    return changed


def one_rounding(a: Arithmetic) -> tuple[float, float]:
    """Return what one rounding to the engine's format changes of a value that came through binary32.

    Returns:
        relative to the value, and added to that.
    """
    return a.format.unit_roundoff + 2 * U, a.format.tiny


def own_rounding(value: FloatArray, a: Arithmetic) -> FloatArray:
    """Return the rounding of an elementwise result; of three where the engine may work in other steps."""
    allowed: FloatArray = (1.0 if a.known else 3.0) * U * np.abs(value) + TINY
    return allowed
