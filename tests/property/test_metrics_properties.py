"""Properties of the metrics that no implementation detail may break."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crossval.compare.metrics import measure

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def pairs(draw: st.DrawFn, elements: st.SearchStrategy[float] = FINITE) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    array = hnp.arrays(np.float32, shape, elements=elements)
    return draw(array), draw(array)


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_ranges(pair: tuple[np.ndarray, np.ndarray]) -> None:
    m = measure(*pair)
    for cosine in (m.cosine, m.worst_token_cosine):
        assert cosine is None or -1.0 <= cosine <= 1.0
    for value in (m.nmse, m.worst_token_nmse, m.max_abs, m.norm_ratio):
        assert value is None or (value >= 0 and math.isfinite(value))
    assert 0.0 <= m.exact_match_rate <= 1.0
    assert m.bitwise_equal == (m.exact_match_rate == 1.0) == (m.n_equal == m.n_elements)
    assert (m.max_abs == 0.0) == (m.max_ulp == 0) == (m.nmse == 0.0) == (m.worst_token is None)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_symmetric_measures_are_symmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = measure(*pair), measure(*reversed(pair))
    assert (a.max_abs, a.max_ulp, a.n_equal) == (b.max_abs, b.max_ulp, b.n_equal)
    assert (a.cosine is None) == (b.cosine is None)
    assert a.cosine is None or math.isclose(a.cosine, b.cosine or 0.0, abs_tol=1e-12)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_an_array_equals_itself(pair: tuple[np.ndarray, np.ndarray]) -> None:
    m = measure(pair[0], pair[0].copy())
    assert m.bitwise_equal
    assert m.cosine in (None, 1.0)
    assert (m.nmse, m.max_abs, m.max_ulp, m.norm_ratio) == (0.0, 0.0, 0, 1.0)


@given(pairs(st.floats(width=32)))
@settings(max_examples=200, deadline=None)
def test_nonfinite_values_never_give_a_distance(pair: tuple[np.ndarray, np.ndarray]) -> None:
    m = measure(*pair)
    finite = bool(np.isfinite(pair[0]).all() and np.isfinite(pair[1]).all())
    assert (m.max_abs is not None) == finite
    assert (m.candidate_nonfinite + m.reference_nonfinite == 0) == finite
    if not finite:
        assert m.cosine is m.nmse is m.norm_ratio is m.max_ulp is None


@given(pairs(), st.data())
@settings(max_examples=100, deadline=None)
def test_token_order_does_not_matter(pair: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(pair[0]))))
    a, b = measure(*pair), measure(pair[0][order], pair[1][order])
    assert (a.n_equal, a.max_abs, a.max_ulp) == (b.n_equal, b.max_abs, b.max_ulp)
    assert (a.worst_token_nmse is None) == (b.worst_token_nmse is None)
    if a.worst_token_nmse is not None and b.worst_token_nmse is not None:
        assert math.isclose(a.worst_token_nmse, b.worst_token_nmse, rel_tol=1e-12)
