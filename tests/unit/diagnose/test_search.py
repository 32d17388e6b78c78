"""Diagnosis: every known bug is identified, nothing else is, and no name is ever wrong."""

from dataclasses import replace

import numpy as np
import pytest

from crossval.audit.bounds import Arithmetic, readings
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis, Explanation, combine
from crossval.diagnose.search import diagnose
from crossval.diagnose.variants import candidates, of_records
from crossval.diagnose.variants.context import linear
from crossval.diagnose.variants.distance import per_token
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.model.graphs import op_table
from crossval.model.kinds import RmsNorm
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics

PASSES = ((5, 90, 17, 299, 4, 63, 120), (8,), (33, 201, 0, 7, 250, 33))
LINEAR = ("q", "ffn_down")
FLOATS = (
    "attn_norm",
    "q_rope",
    "kq",
    "kq_soft_max",
    "kqv_out",
    "attn_sub_norm",
    "ffn_inp",
    "ffn_norm",
    "ffn_act",
    "ffn_out",
    "l_out",
)
KNOWN = Arithmetic(Numerics(8, False), n_heads=4)


class Recorded:
    """An engine's arrays of three passes, and the contexts of its operations."""

    def __init__(self, path, runner):
        self.weights = SpecWeights(path)
        self.table = {op.output: op for op in op_table(self.weights.config)}
        with runner:
            self.records = [runner.eval(tokens, list(self.table)) for tokens in PASSES]

    def context(self, name, index=0):
        return of_records(self.table[name], self.records, self.weights.config, self.weights, index=index)


@pytest.fixture(scope="module")
def path(make_model):
    return make_model(n_layers=3, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256)


@pytest.fixture(scope="module")
def spec(path):
    return Recorded(path, SpecRunner(path))


@pytest.fixture(scope="module")
def engine(path):
    return Recorded(path, BitnetPyRunner(path, n_threads=1))


def recorded_as(context, output, noise=1e-7):
    """The context with another recorded output: float32, with the noise of float32 arithmetic."""
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore", invalid="ignore"):
        array = (output * (1 + noise * rng.normal(size=output.shape))).astype(np.float32)
    return replace(context, recorded=array.reshape(context.recorded.shape))


def reading(context, arithmetic):
    """The context as an engine of known arithmetic rounds."""
    if arithmetic is None:
        return context
    if context.is_linear:
        return replace(context, quantizer="float32")
    (only,) = readings(context.op, arithmetic, context.n_tokens, context.n_rows)
    return replace(context, rounded=only.rounded)


def simulate(context, arithmetic=None, every=1, only=""):
    """Yield every mistake that shows, with the diagnosis of an engine that makes it."""
    as_read = reading(context, arithmetic)
    tried = [c for late in (False, True) for c in candidates(as_read, deferred=late)]
    for one in [c for c in tried if only in c.explanation][::every]:
        with np.errstate(all="ignore"):
            wrong = one.compute(as_read)
        if wrong is None:
            continue
        guilty = recorded_as(as_read, wrong)
        if per_token(guilty, guilty.expected).max() < 3e-6:
            continue  # as good as right on this input
        yield one, diagnose(replace(guilty, quantizer="float64", rounded=()), arithmetic)


def judge(cases):
    """Assert that no name is wrong and nothing goes unexplained; return the fraction of mistakes with a name."""
    cases = list(cases)
    assert cases
    for one, found in cases:
        if found.determined:
            assert found.name in (one.name, one.group), f"{one.name} was called {found.name}"
        assert one.name in [e.name for e in found.candidates], f"{one.name}: {found.explanation}"
        assert found.ratio is not None
        assert found.ratio <= 1e-5
    return sum(found.determined for _, found in cases) / len(cases)


def changed(array, *places_and_factors):
    """A copy with some places multiplied."""
    array = array.copy()
    for place, factor in zip(places_and_factors[::2], places_and_factors[1::2], strict=True):
        array[place] *= factor
    return array


class TestEveryMistake:
    @pytest.mark.parametrize("op", FLOATS)
    def test_of_float_operations(self, spec, op):
        """In a batch after other tokens, where most mistakes show."""
        context = spec.context(f"blk.1.{op}", 2)
        every = 8 if op in ("kq", "kqv_out") else 1  # dozens of single cache cells
        assert judge(simulate(context, every=every)) >= 0.85

    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("op", ["q_rope", "kq", "kq_soft_max", "kqv_out", "ffn_norm"])
    def test_in_a_prompt_and_in_one_decoded_token(self, spec, op, index):
        context = spec.context(f"blk.2.{op}", index)
        judge(simulate(context, every=10 if op in ("kq", "kqv_out") else 2))

    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("op", ["inp_embd", "result_norm", "result_output"])
    def test_of_the_ends_of_the_model(self, spec, op, index):
        assert judge(simulate(spec.context(op, index))) >= 0.9

    @pytest.mark.parametrize("op", LINEAR)
    def test_of_bitlinear_in_an_engine_that_says_how_it_rounds(self, spec, op):
        assert judge(simulate(spec.context(f"blk.1.{op}"), KNOWN, every=2)) >= 0.95

    def test_of_bitlinear_in_an_engine_that_does_not(self, spec):
        assert judge(simulate(spec.context("blk.1.v", 2), every=4)) >= 0.9

    @pytest.mark.parametrize("op", ["kq", "kqv_out", "result_output"])
    def test_of_f16_roundings_on_what_an_engine_recorded(self, engine, op):
        name = op if op == "result_output" else f"blk.2.{op}"
        cases = list(simulate(engine.context(name, 1), KNOWN, only="bitnet.cpp"))
        assert judge(cases) >= 0.6
        assert any("F16 rounding of" in found.name for _, found in cases)

    def test_named_in_the_middle_of_a_wide_matrix(self, make_model):
        """More features than are checked first: the sample finds it, all features confirm it."""
        wide = make_model(n_layers=1, hidden_dim=1536)
        found = Recorded(wide, SpecRunner(wide))
        context = found.context("blk.0.ffn_up")
        by_name = {c.name: c for c in candidates(context)}
        for name in ("codes read four in a row", "no activation quantisation", "weights of blk.0.ffn_gate.weight"):
            assert diagnose(recorded_as(context, by_name[name].compute(context))).name == name
        lost = context.expected.copy()
        lost[:, 700:1000] = 0.0
        assert diagnose(recorded_as(context, lost)).name == "features 700 to 1000 (exclusive) zero"
        lost[0, 1] *= 2  # and one value that no sample need hold
        guilty = recorded_as(context, lost)
        assert diagnose(guilty).name == UNDETERMINED

    def test_a_far_layers_weights_are_found_last(self, make_model):
        deep = make_model(n_layers=6, dim=128, hidden_dim=128)
        found = Recorded(deep, SpecRunner(deep))
        context = found.context("blk.1.ffn_up")
        other = found.weights["blk.4.ffn_up.weight"]
        wrong = linear(context, matrix=other)
        assert diagnose(recorded_as(context, wrong)).name == "weights of blk.4.ffn_up.weight"


class TestTies:
    """Mistakes that only show at rounding ties: rows whose scale is exactly 1."""

    @pytest.mark.parametrize("name", ["round half up", "round half away from zero"])
    @pytest.mark.parametrize("arithmetic", [None, KNOWN])
    def test_rounding_of_ties_is_told_apart(self, spec, name, arithmetic):
        rng = np.random.default_rng(1)
        x = rng.integers(-126, 126, (7, 128)) + 0.25 * rng.integers(0, 4, (7, 128))
        x[:, 0] = 127.0
        context = replace(spec.context("blk.1.q"), raw=(x.astype(np.float32),))
        (wrong,) = (c.compute(context) for c in candidates(context) if c.name == name)
        found = diagnose(recorded_as(context, wrong), arithmetic)
        assert found.name == name
        assert found.specification_ratio > 1e-4


class TestHealthyAndUnknown:
    def test_healthy_operations_have_no_mistake(self, spec, engine):
        """Every operation in one layer, the layers and passes by turns."""
        of_model = [name for name, op in spec.table.items() if op.layer is None]
        kinds = dict.fromkeys(op.name for op in spec.table.values() if op.layer is not None)
        in_layers = [f"blk.{i % spec.weights.config.n_layers}.{kind}" for i, kind in enumerate(kinds)]
        for recorded, arithmetic in ((spec, None), (engine, KNOWN)):
            for i, name in enumerate([*of_model, *in_layers]):
                found = diagnose(recorded.context(name, i % 3), arithmetic)
                assert found.name == UNDETERMINED, f"{name}: {found.name}"
                assert found.candidates == ()

    @pytest.mark.parametrize(
        "op", ["q", "attn_norm", "k_rope", "kq", "kq_soft_max", "kqv_out", "ffn_act", "l_out"]
    )
    @pytest.mark.parametrize("kind", ["noise", "small noise", "one value", "features swapped", "two mistakes"])
    def test_unknown_faults_are_not_named(self, engine, op, kind):
        context = engine.context(f"blk.1.{op}")
        right = reading(context, KNOWN).expected
        rng = np.random.default_rng(2)
        if kind == "two mistakes":
            wrong = 1.01 * right[..., ::-1]
        elif kind == "features swapped":
            wrong = right.copy()
            wrong[..., [0, 1, 2]] = wrong[..., [2, 0, 1]]
        elif kind == "one value":
            wrong = right.copy()
            wrong[(-1,) * wrong.ndim] += 0.37 * np.abs(right).max()
        else:
            wrong = right + rng.normal(size=right.shape) * np.abs(right).std() * (1.0 if kind == "noise" else 1e-3)
        found = diagnose(recorded_as(context, wrong), KNOWN)
        if (op, kind) == ("q", "features swapped"):  # rows of a matrix are looked up among each other
            assert found.name == "3 output rows exchanged"
            return
        if (op, kind) == ("kq", "features swapped"):  # so are keys
            assert found.name == "KV positions 0, 1, 2 read as 2, 0, 1"
            return
        assert found.name == UNDETERMINED
        assert found.family is None
        assert found.explanation.startswith("no known bug explains it")

    @pytest.mark.parametrize(
        ("op", "index", "change", "said"),
        [
            ("ffn_norm", 1, lambda y: 0.8 * y, "0.8 times"),  # of one token: any factor is some eps
            (
                "attn_norm",
                0,
                lambda y: changed(y, (3, slice(10, 20)), 1.7, (3, 15), -3),
                "only position 3, features 10-19 deviate",
            ),
            ("ffn_act", 0, lambda y: changed(y, (2, 5), np.nan), "1 of 1792 values are not finite"),
        ],
    )
    def test_what_has_no_name_is_described(self, spec, op, index, change, said):
        context = spec.context(f"blk.1.{op}", index)
        found = diagnose(recorded_as(context, change(context.expected)))
        assert found.name == UNDETERMINED
        assert said in found.explanation
        assert np.isfinite(found.specification_ratio)


class TestMalformed:
    def test_a_wrong_shape_is_said(self, spec):
        for name in ("blk.1.q", "blk.1.ffn_inp", "result_output"):
            context = spec.context(name)
            found = diagnose(replace(context, recorded=context.recorded[..., :-1]))
            assert found.name == UNDETERMINED
            assert found.explanation.startswith("expected shape")

    def test_inputs_that_do_not_fit_are_said(self, spec):
        for name in ("blk.1.q", "blk.1.ffn_inp", "blk.1.attn_norm", "blk.1.kq", "result_output"):
            context = spec.context(name)
            found = diagnose(replace(context, raw=(context.raw[0][..., :-1], *context.raw[1:])))
            assert found.name == UNDETERMINED
            assert "shapes of its inputs do not match" in found.explanation

    def test_other_arrays_of_a_wrong_shape_are_no_evidence(self, spec):
        context = spec.context("blk.1.ffn_act")
        up = context.values["blk.1.ffn_up"]
        context = replace(context, values={"blk.1.ffn_up": replace(up, array=up.array[:, :7])})
        silu = context.inputs[0] / (1 + np.exp(-context.inputs[0]))
        assert diagnose(recorded_as(context, silu)).name == "SiLU"


class TestFlips:
    def test_an_engine_that_flips_codes_at_ties_still_gets_the_name(self, spec):
        """A third engine in float32: some of its codes round the other way at a tie."""
        rng = np.random.default_rng(3)
        x = rng.normal(size=(24, 128)).astype(np.float32)
        scale = 127.0 / np.abs(x).max(axis=-1)
        for token in range(0, 24, 4):  # as near to a tie as float32 gets
            x[token, 7] = np.float32((np.floor(x[token, 7] * scale[token]) + 0.5) / scale[token])
        base = spec.context("blk.1.q")
        context = replace(
            base,
            raw=(x,),
            rows=tuple(range(24)),
            recorded=np.zeros((24, 4, 32), np.float32),
            plan=replace(base.plan, token_ids=tuple(range(24))),
            values={},
        )
        codes, unit = context.quantized
        flipped = codes.copy()
        flipped[::4, 7] += np.where(codes[::4, 7] > x[::4, 7] * unit[::4, 0], -1, 1)
        wrong = linear(context, codes=flipped, scale=unit, weight_scale=1.0)
        assert diagnose(recorded_as(context, wrong)).name == "weight scale ignored"


class TestQuantizerReadings:
    @pytest.mark.parametrize(("fused", "name"), [(False, "float32"), (True, "fused")])
    def test_codes_are_rounded_as_the_engine_says(self, spec, fused, name):
        """Rows found by search in which the product's own rounding to float32 decides a code."""
        rng = np.random.default_rng(4)
        base = spec.context("blk.1.q")
        x = rng.normal(size=(30000, 128)).astype(np.float32)
        both = [replace(base, raw=(x,), quantizer=how).quantized[0] for how in ("float32", "fused")]
        rows = np.flatnonzero((both[0] != both[1]).any(axis=-1))[:3]
        assert rows.size
        n = rows.size
        plan = replace(base.plan, token_ids=tuple(range(n)))
        context = replace(
            base,
            raw=(x[rows],),
            rows=tuple(range(n)),
            recorded=np.zeros((n, 4, 32), np.float32),
            plan=plan,
            values={},
        )
        wrong = linear(replace(context, quantizer=name), weight_scale=1.0)
        guilty = recorded_as(context, wrong)
        assert diagnose(guilty, Arithmetic(Numerics(8, fused), 4)).name == "weight scale ignored"
        assert diagnose(guilty).name == "weight scale ignored"
        assert diagnose(guilty, Arithmetic(Numerics(8, not fused), 4)).name == UNDETERMINED


class TestAmbiguity:
    def test_mistakes_that_agree_on_this_input_are_listed(self, spec):
        """The first token decoded after the prompt: position 0 is no rotation."""
        context = spec.context("blk.1.q_rope", 1)
        found = diagnose(recorded_as(context, context.inputs[0]))
        assert found.name == UNDETERMINED
        assert [e.name for e in found.candidates] == ["not rotated", "positions restart after 7"]
        assert "not rotated or positions restart after 7: not distinguishable on this input" in found.explanation
        assert found.family == 8

    def test_members_of_one_group_are_named_by_it(self, spec):
        """The header states 1e-3; on large rows an eps of 1e-12 has no effect."""
        context = spec.context("blk.1.attn_norm")
        context = replace(
            context,
            raw=(30 * context.raw[0],),
            config=replace(context.config, rms_eps=1e-3),
            op=replace(context.op, kind=RmsNorm(1e-3)),
        )
        x = context.inputs[0]
        without = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)) * context.vector
        found = diagnose(recorded_as(context, without, noise=1e-8), KNOWN)
        assert found.name == "wrong or misplaced eps"
        assert {"eps 0", "eps 1e-12", "eps as a lower limit"} <= {e.name for e in found.candidates}

    def test_several_passes_decide_together(self, spec):
        """Positions that count from 0 after the prompt: the first decoded token alone does not show it."""
        found = []
        for index in (1, 2):
            context = spec.context("blk.1.q_rope", index)
            by_name = {c.name: c for c in candidates(context)}
            wrong = by_name["positions restart after 7"].compute(context)
            found.append(diagnose(recorded_as(context, wrong)))
        assert [d.name for d in found] == [UNDETERMINED, "positions restart after 7"]
        assert combine(found).name == "positions restart after 7"
        assert combine(found[::-1]).name == "positions restart after 7"


class TestCombine:
    A, B = Explanation("a", "a", 1, "A."), Explanation("b", "b", 2, "B.")

    def made(self, *fits):
        name = fits[0].name if len(fits) == 1 else UNDETERMINED
        return Diagnosis(name, None, "?", 0.0, None, None, 1.0, tuple(fits))

    def test_contradictions_are_undetermined(self):
        found = combine([self.made(self.A), self.made(self.B)])
        assert (found.name, found.family, found.candidates) == (UNDETERMINED, None, ())

    def test_one_unexplained_pass_spoils_the_name(self):
        assert combine([self.made(self.A), self.made()]).name == UNDETERMINED

    def test_one_diagnosis_stays_as_it_is(self):
        assert combine([self.made(self.A)]).name == "a"
        assert combine([self.made()]).name == UNDETERMINED

    def test_nothing_is_an_error(self):
        with pytest.raises(ValueError, match="no diagnosis"):
            combine([])
