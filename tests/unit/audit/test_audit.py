"""The audit: right engines are clean within derived bounds; any wrong number is found in its own operation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest

from bitnet_py.gguf import GGUFFile
from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import decide
from crossval.capture import Capture
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan, PassRecord, TapArray

PROMPT = (1, 17, 42, 250, 3, 99, 8)
PLANS = [PassPlan("prefill", PROMPT, 0), PassPlan("decode", (11,), 7), PassPlan("decode", (12,), 8)]
N_LAYERS = 2


class Altered:
    """A runner that changes what another one records: drops taps, replaces arrays, forgets its numerics."""

    status = "live"
    plan = None

    def __init__(self, runner, change=None, only=None, anonymous=False):
        self._runner, self._change, self._only, self._n = runner, change or {}, only, 0
        self.identity = replace(runner.identity, numerics=Numerics()) if anonymous else runner.identity

    def reset(self) -> None:
        self._runner.reset()
        self._n = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = self._runner.eval(token_ids, [n for n in select if self._only is None or n in self._only])
        given = dict(record.taps)
        for (index, name), change in self._change.items():
            if index == self._n and name in given:
                given[name] = change(given[name])
        self._n += 1
        return PassRecord(record.plan, given)


@pytest.fixture
def engine(make_model):
    with BitnetPyRunner(make_model(), n_threads=1) as runner:
        yield runner


@pytest.fixture
def weights(make_model):
    return SpecWeights(make_model())


def run(runner, weights, plans=PLANS):
    return audit([Capture(runner, weights.config, plans)], weights)[0]


def all_names():
    return taps.all_taps(N_LAYERS)


@pytest.mark.parametrize("simd_width", [8, 16])
@pytest.mark.parametrize("fused", [False, True])
def test_right_engine_is_clean_and_everything_is_covered(make_model, weights, simd_width, fused):
    with BitnetPyRunner(make_model(), n_threads=1, simd_width=simd_width, fused_quantizer=fused) as runner:
        result = run(runner, weights)
    assert result.verdict == "clean"
    assert result.first_guilty is None
    assert len(result.checks) == result.n_covered == result.n_ops == len(all_names()) * len(PLANS)
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
    result = run(Altered(engine, anonymous=True), weights)
    assert result.verdict == "clean"
    used = {check.reading for check in result.checks if check.tap.endswith(".kq")}
    assert used == {"q and k in F16"}


def nudge(factor, name):
    """Move one element by a relative amount, in a copy."""

    def change(tap):
        array = tap.array.copy()
        # of attention scores: the key that every token sees
        first = array[..., 0] if name.endswith(".kq") else array
        at = np.unravel_index(int(np.abs(first).argmax()), first.shape)
        first[at] *= np.float32(1 + factor)
        return TapArray(array, tap.rows)

    return change


@pytest.mark.parametrize("pass_index", [0, 2])
@pytest.mark.parametrize("name", all_names())
def test_one_wrong_element_is_found_in_its_own_operation(engine, weights, name, pass_index):
    op_of = {op.output: op.name for op in op_table(weights.config)}
    # the head's bound is Cauchy-Schwarz's, the largest logit stands well above it
    size = 0.05 if op_of[name] in ("kq_soft_max", "result_output", "kqv_out") else 0.01
    result = run(Altered(engine, {(pass_index, name): nudge(size, name)}), weights)
    assert result.verdict == "guilty"
    guilty = result.first_guilty
    assert (guilty.pass_index, guilty.tap, guilty.n_beyond) == (pass_index, name, 1)
    assert guilty.ratio is None or guilty.ratio > 5  # None: the bound is zero


def test_worst_element_is_reported_with_both_values(engine, weights):
    def change(tap):
        array = tap.array.copy()
        array[3, 1, 5] += 7
        return TapArray(array, tap.rows)

    worst = run(Altered(engine, {(0, "blk.1.q_rope"): change}), weights).first_guilty.worst
    assert (worst.token, worst.index) == (3, (1, 5))
    assert worst.recorded - worst.expected == pytest.approx(7, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.0.kq_soft_max", "blk.1.ffn_act", "result_output", "inp_embd"])
def test_value_that_is_not_finite_is_never_clean(engine, weights, bad, name):
    def change(tap):
        array = tap.array.copy()
        array.reshape(-1)[0] = bad
        return TapArray(array, tap.rows)

    result = run(Altered(engine, {(0, name): change}), weights)
    assert result.verdict == "guilty"
    assert (result.first_guilty.tap, result.first_guilty.status) == (name, "invalid")


def test_scores_of_masked_keys_are_the_engines_own_business(engine, weights):
    def change(tap):
        array = tap.array.copy()
        array[:, np.triu(np.ones(array.shape[1:], bool), 1)] = -np.inf
        return TapArray(array, tap.rows)

    assert run(Altered(engine, {(0, "blk.0.kq"): change}), weights).verdict == "clean"


def test_wrong_shape_is_invalid(engine, weights):
    result = run(Altered(engine, {(0, "blk.0.ffn_up"): lambda tap: TapArray(tap.array[:, :-1].copy())}), weights)
    assert (result.first_guilty.tap, result.first_guilty.status) == ("blk.0.ffn_up", "invalid")


def test_nothing_recorded_is_incomplete(engine, weights):
    result = run(Altered(engine, only=()), weights)
    assert (result.verdict, result.checks, result.n_covered) == ("incomplete", (), 0)


def test_without_logits_the_end_of_the_graph_is_not_covered(engine, weights):
    result = run(Altered(engine, only=set(all_names()) - {"result_output"}), weights)
    assert result.verdict == "incomplete"
    assert result.n_covered == result.n_ops - len(PLANS)


COARSE = [*(f"blk.{layer}.l_out" for layer in range(N_LAYERS)), "result_output"]


@pytest.mark.parametrize("anonymous", [False, True])
@pytest.mark.parametrize("only", [COARSE, ["result_output"], ["blk.0.kqv_out", "blk.1.ffn_inp", "result_output"]])
def test_coarse_trace_is_audited_in_segments(engine, weights, only, anonymous):
    """An engine with F16 keys is right; over several layers the F16 ties may leave a distance unresolved."""
    result = run(Altered(engine, only=only, anonymous=anonymous), weights)
    assert result.verdict == ("within" if only == ["result_output"] else "clean")
    assert result.n_covered == result.n_ops
    assert [check.tap for check in result.checks] == only * len(PLANS)
    assert all(check.n_ops > 1 for check in result.checks)


@pytest.mark.parametrize("only", [COARSE, ["result_output"], [n for n in all_names() if "norm" not in n]])
def test_segments_of_an_engine_without_f16_are_shown_to_the_rounding(make_model, weights, only):
    with SpecRunner(make_model()) as specification:
        result = run(Altered(specification, only=only), weights)
    assert result.verdict == "clean"
    assert max(check.ratio for check in result.checks) < 1


def test_a_flip_inside_a_segment_is_explained_exactly(make_model, weights):
    """The other quantiser rounds ties to other sides; what it changes is found again, activation by activation."""
    only, explained = [n for n in all_names() if "norm" not in n], 0
    with BitnetPyRunner(make_model(), n_threads=1, fused_quantizer=True) as runner:
        other = Altered(runner, only=only)
        other.identity = replace(runner.identity, numerics=Numerics(8, False))
        rng = np.random.default_rng(0)
        for _ in range(4):
            ids = tuple(int(i) for i in rng.integers(0, 300, 200))
            result = run(other, weights, [PassPlan("prefill", ids, 0)])
            assert result.verdict == "clean"
            explained += sum(check.flips for check in result.checks if check.n_ops > 1)
    assert explained > 0


def test_coarse_trace_names_the_layer(make_model, weights):
    path = make_model()
    damaged = path.with_name("damaged.gguf")
    data = bytearray(path.read_bytes())
    with GGUFFile.open(path) as gguf:
        info = gguf.tensors["blk.1.ffn_down.weight"]
        at = info.offset + info.shape[0] * info.shape[1] // 4
    data[at : at + 4] = (np.frombuffer(bytes(data[at : at + 4]), "<f4") * 2).astype("<f4").tobytes()
    damaged.write_bytes(data)
    with BitnetPyRunner(damaged, n_threads=1) as runner:
        coarse = run(Altered(runner, only=COARSE), weights)
        fine = run(runner, weights)
    assert coarse.verdict == fine.verdict == "guilty"
    assert coarse.first_guilty.tap == "blk.1.l_out"
    assert fine.first_guilty.tap == "blk.1.ffn_down"


def test_flips_at_ties_are_explained_and_counted(make_model, weights):
    """An engine with the other quantiser, said to have this one, differs by flips only."""
    flips = 0
    with BitnetPyRunner(make_model(), n_threads=1, fused_quantizer=True) as runner:
        other = Altered(runner)
        other.identity = replace(runner.identity, numerics=Numerics(8, False))
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


def test_decide_needs_checks_and_full_coverage(engine, weights):
    checks = run(engine, weights).checks
    assert decide(checks, len(checks), len(checks)) == "clean"
    assert decide((), 0, 0) == decide((), 5, 0) == "incomplete"
    assert decide(checks, len(checks) + 1, len(checks)) == "incomplete"
    assert decide([replace(checks[0], status="unchecked")], 1, 1) == "incomplete"
    assert decide([replace(checks[0], status="invalid")], 1, 1) == "guilty"


def test_known_arithmetic_sums_in_short_chains():
    known, unknown = Arithmetic(Numerics(8, False), 4), Arithmetic(Numerics(), 4)
    assert known.sum_steps(2560) < 330
    assert unknown.sum_steps(2560) == 2560
