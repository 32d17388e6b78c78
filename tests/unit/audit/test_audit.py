"""The audit: right engines are clean within derived bounds; any wrong number is found in its own operation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan
from tests.support.extra import sampled
from tests.support.wrapped import Wrapped

PROMPT = (1, 17, 42, 250, 3, 99, 8)
PLANS = [PassPlan("prefill", PROMPT, 0), PassPlan("decode", (11,), 7), PassPlan("decode", (12,), 8)]


ALL = taps.of_model(2)


def run(runner, weights, plans=PLANS):
    return audit([Capture(runner, weights.config, plans)], weights)[0]


@pytest.mark.parametrize("simd_width", [8, 16])
@pytest.mark.parametrize("fused", [False, True])
def test_right_engine_is_clean_and_everything_is_covered(make_model, weights, simd_width, fused):
    with BitnetPyRunner(make_model(), n_threads=1, numerics=Numerics(simd_width, fused)) as runner:
        result = run(runner, weights)
    assert result.verdict == "clean"
    assert result.first_guilty is None
    assert len(result.checks) == result.n_covered == result.n_ops == len(ALL) * len(PLANS)
    assert all(check.n_ops == 1 and check.n_beyond == 0 for check in result.checks)
    assert sum(check.flips for check in result.checks) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 33])
def test_right_engine_is_clean_at_every_prompt_length(engine, weights, length):
    ids = tuple(int(i) for i in np.random.default_rng(length).integers(0, 300, length))
    result = run(engine, weights, [PassPlan("prefill", ids, 0), PassPlan("decode", (5,), length)])
    assert result.verdict == "clean"


def test_one_head_and_no_sub_norms_and_a_separate_head_are_clean(make_model):
    for shape in ({"n_heads": 1, "n_kv_heads": 1}, {"sub_norms": False}, {"untied_head": True}):
        path = make_model(**shape)
        with BitnetPyRunner(path, n_threads=1) as runner:
            assert run(runner, SpecWeights(path)).verdict == "clean"


def test_specification_is_clean_as_an_engine_of_unknown_arithmetic(make_model, weights):
    with SpecRunner(make_model()) as runner:
        assert run(runner, weights).verdict == "clean"


def test_engine_that_does_not_state_its_numerics_is_clean(engine, weights):
    result = run(Wrapped(engine, numerics=Numerics()), weights)
    assert result.verdict == "clean"
    used = {check.reading for check in result.checks if check.tap.endswith(".kq")}
    assert used == {"q and k in F16"}


def nudge(factor, name):
    """Move one element by a relative amount."""

    def change(array):
        # of attention scores: the key that every token sees
        first = array[..., 0] if name.endswith(".kq") else array
        at = np.unravel_index(int(np.abs(first).argmax()), first.shape)
        first[at] *= np.float32(1 + factor)
        return array

    return change


@pytest.mark.parametrize(("name", "pass_index"), sampled(product(ALL, (0, 2)), 3, lambda case: case[:1]))
def test_one_wrong_element_is_found_in_its_own_operation(engine, weights, name, pass_index):
    op_of = {op.output: op.name for op in op_table(weights.config)}
    # the head's bound is Cauchy-Schwarz's, the largest logit stands well above it
    size = 0.05 if op_of[name] in ("kq_soft_max", "result_output", "kqv_out") else 0.01
    result = run(Wrapped(engine, at={(pass_index, name): nudge(size, name)}), weights)
    assert result.verdict == "guilty"
    guilty = result.first_guilty
    assert (guilty.pass_index, guilty.tap, guilty.n_beyond) == (pass_index, name, 1)
    assert guilty.ratio is None or guilty.ratio > 5  # None: the bound is zero


def test_worst_element_is_reported_with_both_values(engine, weights):
    def change(array):
        array[3, 1, 5] += 7
        return array

    worst = run(Wrapped(engine, at={(0, "blk.1.q_rope"): change}), weights).first_guilty.worst
    assert (worst.token, worst.index) == (3, (1, 5))
    assert worst.recorded - worst.expected == pytest.approx(7, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.0.kq_soft_max", "blk.1.ffn_act", "result_output", "inp_embd"])
def test_value_that_is_not_finite_is_never_clean(engine, weights, bad, name):
    def change(array):
        array.reshape(-1)[0] = bad
        return array

    result = run(Wrapped(engine, at={(0, name): change}), weights)
    assert result.verdict == "guilty"
    assert (result.first_guilty.tap, result.first_guilty.status) == (name, "invalid")


def test_scores_of_masked_keys_are_the_engines_own_business(engine, weights):
    def change(array):
        array[:, np.triu(np.ones(array.shape[1:], bool), 1)] = -np.inf
        return array

    assert run(Wrapped(engine, at={(0, "blk.0.kq"): change}), weights).verdict == "clean"


def test_wrong_shape_is_invalid(engine, weights):
    result = run(Wrapped(engine, at={(0, "blk.0.ffn_up"): lambda array: array[:, :-1]}), weights)
    assert (result.first_guilty.tap, result.first_guilty.status) == ("blk.0.ffn_up", "invalid")


def test_nothing_recorded_is_incomplete(engine, weights):
    result = run(Wrapped(engine, only=()), weights)
    assert (result.verdict, result.checks, result.n_covered) == ("incomplete", (), 0)


def test_without_logits_the_end_of_the_graph_is_not_covered(engine, weights):
    result = run(Wrapped(engine, only=set(ALL) - {"result_output"}), weights)
    assert result.verdict == "incomplete"
    assert result.n_covered == result.n_ops - len(PLANS)


def test_flips_at_ties_are_explained_and_counted(make_model, weights):
    """An engine with the other quantiser, said to have this one, differs by flips only."""
    flips = 0
    with BitnetPyRunner(make_model(), n_threads=1, numerics=Numerics(8, True)) as runner:
        other = Wrapped(runner, numerics=Numerics(8, False))
        rng = np.random.default_rng(0)
        for _ in range(4):
            ids = tuple(int(i) for i in rng.integers(0, 300, 256))
            result = run(other, weights, [PassPlan("prefill", ids, 0)])
            assert result.verdict == "clean"
            flips += sum(check.flips for check in result.checks)
    assert flips > 0


def test_two_engines_share_one_audit(engine, make_model, weights):
    with SpecRunner(make_model()) as specification:
        results = audit([Capture(one, weights.config, PLANS) for one in (engine, specification)], weights)
    assert [r.engine for r in results] == ["bitnet_py", "specification"]
    assert {r.verdict for r in results} == {"clean"}


def test_passes_must_continue_each_other(engine, weights):
    for plans in ([], [PassPlan("prefill", (), 0)], [PassPlan("decode", (1,), 3)]):
        with pytest.raises(BadInputError):
            run(engine, weights, plans)
