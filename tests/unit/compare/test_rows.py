"""One tap against another, and verdicts recomputed from rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from crossval.compare.rows import (
    MAX_TOKENS_SHOWN,
    Coverage,
    GreedyPrompt,
    GreedyStep,
    Skip,
    TapRow,
    compare_tap,
    decide,
    decide_greedy,
    exact_match_rate,
    first_divergence,
    first_inexact,
    row_status,
)
from crossval.model.tolerance import PolicyName, tolerance_for
from crossval.passes import PassPlan, TapArray

PREFILL = PassPlan("prefill", (5, 6, 7), 0)
DECODE = PassPlan("decode", (8,), 3)


def compare(
    candidate: TapArray, reference: TapArray, name: str = "blk.0.l_out", plan: PassPlan = PREFILL, index: int = 0
) -> TapRow | Skip:
    return compare_tap(name, index, plan, candidate, reference, tolerance_for(name, 2, "independent"))


def row(candidate: TapArray, reference: TapArray, name: str = "blk.0.l_out", index: int = 0) -> TapRow:
    found = compare(candidate, reference, name, PREFILL if index == 0 else DECODE, index)
    assert isinstance(found, TapRow)
    return found


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = array(3, 64)
EQUAL = row(TapArray(X), TapArray(X.copy()))
WITHIN = row(TapArray(X * np.float32(1.001)), TapArray(X))
DIVERGED = row(TapArray(-X), TapArray(X))


def test_states() -> None:
    assert (EQUAL.status, WITHIN.status, DIVERGED.status) == ("equal", "within", "diverged")
    assert EQUAL.note is WITHIN.note is None
    assert DIVERGED.note is not None
    assert "cosine" in DIVERGED.note
    assert EQUAL.bound.keys() == DIVERGED.bound.keys()


def test_scale_alone_diverges() -> None:
    found = row(TapArray(X * np.float32(1.1)), TapArray(X))
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.status == "diverged"
    assert found.note is not None
    assert "norm_ratio" in found.note


def test_one_wrong_token_among_many_diverges_and_is_named_by_position() -> None:
    plan = PassPlan("prefill", tuple(range(200)), 10)
    x = array(200, 64)
    y = x.copy()
    y[77] *= np.float32(1.2)
    found = compare(TapArray(y), TapArray(x), plan=plan)
    assert isinstance(found, TapRow)
    assert found.nmse is not None
    assert found.nmse < found.bound["nmse"]
    assert (found.status, found.worst_token) == ("diverged", 87)


def test_the_error_of_each_token_is_kept_where_the_output_of_a_layer_differs() -> None:
    y = X.copy()
    y[1] *= np.float32(1.25)
    y[2] *= np.float32(1.5)
    assert row(TapArray(y), TapArray(X)).token_nmse == (0.0, 0.0625, 0.25)
    assert row(TapArray(y), TapArray(np.where([[1], [1], [0]], X, 0))).token_nmse == (0.0, 0.0625, None)
    assert row(TapArray(y), TapArray(X), "result_norm").token_nmse == (0.0, 0.0625, 0.25)
    assert row(TapArray(y), TapArray(X), "blk.0.attn_norm").token_nmse is None, "not of every tensor"
    assert EQUAL.token_nmse is None
    part = row(TapArray(y[1:], rows=(1, 2)), TapArray(X))
    assert (part.rows_compared, part.token_nmse) == (2, None), "not of every token"
    long = array(MAX_TOKENS_SHOWN + 1, 4)
    plan = PassPlan("prefill", tuple(range(len(long))), 0)
    found = compare(TapArray(-long), TapArray(long), plan=plan)
    assert isinstance(found, TapRow)
    assert found.token_nmse is None


def test_rows_are_intersected() -> None:
    whole, last = TapArray(X), TapArray(X[2:], rows=(2,))
    for pair in ((whole, last), (last, whole)):
        found = row(*pair)
        assert (found.status, found.rows_compared, found.n_elements) == ("equal", 1, 64)
    mixed = row(TapArray(X[[0, 2]], rows=(0, 2)), TapArray(X[1:], rows=(1, 2)))
    assert (mixed.status, mixed.rows_compared) == ("equal", 1)


def test_rows_are_matched_not_just_counted() -> None:
    found = row(TapArray(X[[0, 1]], rows=(0, 1)), TapArray(X[[0, 1]], rows=(0, 2)))
    assert (found.status, found.rows_compared) == ("equal", 1)
    found = row(TapArray(X[[1]], rows=(0,)), TapArray(X[[0]], rows=(0,)))
    assert found.status == "diverged"


def test_no_common_row_is_not_compared() -> None:
    found = compare(TapArray(X[:1], rows=(0,)), TapArray(X[2:], rows=(2,)))
    assert isinstance(found, Skip)
    assert "different tokens" in found.why


@pytest.mark.parametrize(
    "bad",
    [
        TapArray(X[:, :63]),
        TapArray(X[:2]),
        TapArray(X[:0]),
        TapArray(X[0]),
        TapArray(X.astype(np.float64)),  # type: ignore[arg-type]
        TapArray(X, rows=(0, 1)),
        TapArray(X, rows=(0, 2, 1)),
        TapArray(X, rows=(1, 2, 3)),
        TapArray(X, rows=(-1, 0, 1)),
        TapArray(X[:0], rows=()),
        TapArray(X.reshape(3, 8, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_invalid_on_either_side(bad: TapArray) -> None:
    for pair in ((bad, TapArray(X)), (TapArray(X), bad)):
        found = row(*pair)
        assert found.status == row_status(found) == "invalid"
        assert found.note
        assert decide([found], Coverage(1, 1)) == "divergence"


def test_nan_is_invalid_even_when_both_have_it() -> None:
    x = X.copy()
    x[1, 2] = np.nan
    for c, r, who in ((x, X, "candidate"), (X, x, "reference"), (x, x.copy(), "candidate")):
        found = row(TapArray(c), TapArray(r))
        assert found.status == row_status(found) == "invalid"
        assert found.note is not None
        assert f"{who} holds 1 NaN" in found.note


def test_signed_zero_is_within() -> None:
    found = row(TapArray(np.zeros((3, 4), np.float32)), TapArray(-np.zeros((3, 4), np.float32)))
    assert (found.status, found.bitwise_equal) == ("within", False)


def test_zeros_against_numbers_diverge() -> None:
    zero = TapArray(np.zeros((3, 64), np.float32))
    assert row(zero, TapArray(X)).status == "diverged"
    assert row(TapArray(X), zero).status == "diverged"


def test_scores_behind_the_mask_do_not_count_but_weights_do() -> None:
    x = array(2, 3, 3)
    y = x.copy()
    y[:, 0, 2] = np.nan
    y[:, 0, 1] = 99
    found = row(TapArray(y), TapArray(x), "blk.0.kq")
    assert (found.status, found.n_elements) == ("equal", 12)
    y = x.copy()
    y[:, 2, 0] = 99
    found = row(TapArray(y), TapArray(x), "blk.0.kq")
    assert (found.status, found.worst_token) == ("diverged", 2)
    y = x.copy()
    y[:, 0, 2] = 99
    assert row(TapArray(y), TapArray(x), "blk.0.kq_soft_max").status == "diverged"


def test_scores_of_a_row_subset_and_of_a_decode_pass() -> None:
    x = array(2, 3, 3)
    found = row(TapArray(x), TapArray(x[:, 1:], rows=(1, 2)), "blk.0.kq")
    assert (found.status, found.rows_compared, found.n_elements) == ("equal", 2, 10)
    x = array(2, 1, 4)
    found = row(TapArray(x), TapArray(x.copy()), "blk.0.kq", index=1)
    assert (found.status, found.n_elements) == ("equal", 8)


@pytest.mark.parametrize(
    "lie",
    [
        {"status": "equal"},
        {"bitwise_equal": True},
        {"exact_match_rate": 1.0},
        {"exact_match_rate": 1.0, "bitwise_equal": True},
        {"exact_match_rate": 1.0, "bitwise_equal": True, "max_ulp": 0},
        {"cosine": 1.0},
        {"n_elements": 0},
        {"bound": {}},
        {"nmse": None},
        {"nmse": math.nan, "worst_token_nmse": 0.0, "cosine": 1.0, "worst_token_cosine": 1.0, "norm_ratio": 1.0},
    ],
)
def test_a_row_is_judged_by_its_numbers_not_its_word(lie: dict[str, object]) -> None:
    lied = replace(DIVERGED, **lie)  # type: ignore[arg-type]
    assert row_status(lied) in ("diverged", "invalid")
    assert decide([lied], Coverage(1, 1)) == "divergence"


def test_verdicts() -> None:
    later = replace(EQUAL, pass_index=1, pass_kind="decode")
    assert decide([EQUAL, later], Coverage(2, 2)) == "parity"
    assert decide([WITHIN], Coverage(1, 1)) == "parity"
    assert decide([EQUAL, replace(DIVERGED, pass_index=1)], Coverage(2, 2)) == "divergence"
    assert decide([DIVERGED], Coverage(5, 1)) == "divergence"


@pytest.mark.parametrize(
    ("rows", "coverage"),
    [
        ([], Coverage(0, 0)),
        ([], Coverage(1, 0, (Skip(0, "inp_embd", "why"),))),
        ([EQUAL], Coverage(0, 0)),
        ([EQUAL], Coverage(2, 1)),
        ([EQUAL], Coverage(2, 2)),
        ([EQUAL, EQUAL], Coverage(2, 2)),
        ([EQUAL], Coverage(1, 1, (Skip(0, "inp_embd", "why"),))),
    ],
)
def test_anything_missing_is_incomplete(rows: list[TapRow], coverage: Coverage) -> None:
    assert decide(rows, coverage) == "incomplete"


def test_first_is_first_in_execution_order() -> None:
    rows = [
        replace(DIVERGED, tap="blk.1.l_out"),
        replace(DIVERGED, tap="inp_embd", pass_index=1),
        replace(WITHIN, tap="blk.0.ffn_inp"),
        replace(DIVERGED, tap="blk.1.q"),
        replace(EQUAL, tap="inp_embd"),
        replace(DIVERGED, tap="result_norm"),
    ]
    place = first_divergence(rows)
    assert place is not None
    assert (place.pass_index, place.tap, place.layer, place.row) == (0, "blk.1.q", 1, DIVERGED.worst_token)
    place = first_inexact(rows)
    assert place is not None
    assert (place.tap, place.layer) == ("blk.0.ffn_inp", 0)
    assert first_divergence([EQUAL, WITHIN]) is None
    assert first_inexact([EQUAL]) is None


def prompt(candidate: str, reference: str, required: int = 3, logits: TapRow = EQUAL) -> GreedyPrompt:
    ours, theirs = tuple(map(ord, candidate)), tuple(map(ord, reference))
    steps = tuple(
        GreedyStep(i, a, b, False, replace(logits, pass_index=i), 1.0, 1.0)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return GreedyPrompt((1,), required, steps, ours, theirs, same, None, None)


@pytest.mark.parametrize("policy", ["same", "independent"])
def test_greedy_verdicts(policy: PolicyName) -> None:
    assert decide_greedy([prompt("abc", "abc")], policy) == "parity"
    assert decide_greedy([prompt("abc", "abc"), prompt("abc", "abx")], policy) == "divergence"
    assert decide_greedy([prompt("abc", "abc", logits=DIVERGED)], policy) == "divergence"
    assert decide_greedy([prompt("ab", "ab")], policy) == "incomplete"
    assert decide_greedy([prompt("abc", "abc"), prompt("", "")], policy) == "incomplete"
    assert decide_greedy([], policy) == "incomplete"
    assert decide_greedy([prompt("", "", required=0)], policy) == "incomplete"
    lied = replace(prompt("abc", "abc"), candidate_tokens=(1, 2, 3))
    assert decide_greedy([lied], policy) == "divergence"


def test_engines_that_state_the_same_arithmetic_have_equal_bits() -> None:
    assert decide_greedy([prompt("abc", "abc", logits=WITHIN)], "independent") == "parity"
    assert decide_greedy([prompt("abc", "abc", logits=WITHIN)], "same") == "divergence"
    signed_zeros = replace(WITHIN, max_abs=0.0, max_ulp=0)
    assert row_status(signed_zeros) == "within"
    assert decide_greedy([prompt("abc", "abc", logits=signed_zeros)], "same") == "divergence"


def test_greedy_rate_counts_required_steps() -> None:
    assert exact_match_rate([prompt("abc", "abc"), prompt("abc", "abx")]) == 5 / 6
    assert exact_match_rate([prompt("ab", "ab", required=4)]) == 0.5
    assert exact_match_rate([]) == 0.0
