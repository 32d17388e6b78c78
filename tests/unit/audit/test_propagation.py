"""Bounds of values that are not finite."""

from __future__ import annotations

import warnings

import numpy as np

from crossval.audit.bounds.approx import Approx


def test_the_bound_of_an_infinity_is_no_number_and_no_warning():
    value = np.array([[1.0, np.inf], [2.0, 4.0]])
    nothing = np.zeros_like(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = Approx(value, nothing, nothing, np.array([0.0, 0.5])).total
    assert not total[0, 1] <= 1.0  # nothing is within it
    np.testing.assert_array_equal(total[[0, 1, 1], [0, 0, 1]], [0.0, 1.0, 2.0])
