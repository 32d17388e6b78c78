"""Formats: rounding as in hardware, and the unit roundoff that rounding actually reaches."""

from __future__ import annotations

import numpy as np
import pytest

from crossval.formats import BF16, F16, F32, FORMATS, Format


def values(n: int = 20000) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.uniform(1, 2, n) * np.exp2(rng.integers(-10, 10, n)) * rng.choice([-1, 1], n)).astype(np.float32)


@pytest.mark.parametrize("form", [F16, BF16], ids=lambda form: form.name)
def test_one_rounding_is_off_by_the_unit_roundoff_and_no_more(form: Format) -> None:
    x = values().astype(np.float64)
    off = np.abs(form.round(x) - x) / np.abs(x)
    assert 0.98 * form.unit_roundoff < off.max() <= form.unit_roundoff
    ties = np.ldexp(1.0, -10 if form is F16 else -7) * np.array([0.5, 1.5, 2.5, 3.5]) + 1.0
    step = 2 * form.unit_roundoff
    assert ((form.round(ties) - 1.0) / step).tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("form", [F16, BF16], ids=lambda form: form.name)
def test_below_the_normal_numbers_the_error_is_absolute(form: Format) -> None:
    smallest = 2 * form.tiny
    assert form.round(np.array([smallest]))[0] == smallest
    assert form.round(np.array([0.49 * smallest]))[0] == 0.0
    x = smallest * np.linspace(0.1, 40, 999)
    assert np.abs(form.round(x) - x).max() <= form.tiny * (1 + 1e-9)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_is_beyond_the_largest_is_infinite(form: Format) -> None:
    assert form.round(np.array([form.largest, -form.largest])).tolist() == [form.largest, -form.largest]
    assert form.round(np.array([form.largest * (1 + form.unit_roundoff)])).tolist() == [np.inf]
    with np.errstate(invalid="ignore"):
        assert np.isnan(form.round(np.array([np.nan, -np.nan]))).all()
    assert form.round(np.array([np.inf, -np.inf])).tolist() == [np.inf, -np.inf]


def test_a_format_holds_its_own_values_and_no_others() -> None:
    x = values()
    for form in (F16, BF16):
        own = form.round(x).astype(np.float32)
        assert form.holds(own)
        assert form.holds(np.append(own, np.float32([np.nan, np.inf, 0.0])))
        assert not form.holds(np.append(own, np.nextafter(np.float32(1), np.float32(2))))
        assert not form.holds(x[:1])
    assert F16.holds(BF16.round(x).astype(np.float32))
    assert not BF16.holds(F16.round(x).astype(np.float32))
    assert F32.holds(x)


def test_bfloat16_keeps_shape_and_strides_do_not_matter() -> None:
    x = values(64).reshape(8, 8)
    assert np.array_equal(BF16.round(x.T), BF16.round(x).T)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_a_format_holds_is_what_rounding_to_it_leaves_as_it_is(form: Format) -> None:
    """Every sign, exponent and upper digit, with few and with many lower digits set."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0, 1, 0x2000, 0x7FFF, 0x8000, 0xFFFF):
        x = (upper | np.uint32(lower)).view(np.float32)
        x = x[np.isfinite(x)].reshape(-1, 2)
        same = form.round(x) == x
        assert np.array_equal(form.keeps(x), same)
        assert np.array_equal(form.keeps(x.T), same.T)
        assert form.holds(x[:, 0]) == same[:, 0].all()
    with_more_digits = np.array([1.0, 1.0 + 2.0**-40])
    assert form.holds(with_more_digits[:1])
    assert not form.holds(with_more_digits)
    assert not form.holds(np.array([1e300]))
