"""The known mistakes as formulas: each against loops written from its description, and the table as a whole."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_py.quants import pack_codes
from crossval.diagnose.variants import (
    EVERY_OP,
    FAMILIES,
    VARIANTS,
    Context,
    Inapplicable,
    candidates,
    embedding_models,
    narrow_sums,
    of_records,
)
from crossval.diagnose.variants.__main__ import variants_markdown
from crossval.diagnose.variants.context import half_away, linear
from crossval.diagnose.variants.ffn import gelu, gelu_tanh, silu
from crossval.diagnose.variants.layouts import SHIFTS, packed, sequential, strided
from crossval.diagnose.variants.precision import f16_read_as_bf16, to_q8_0, truncate_bf16
from crossval.diagnose.variants.rope import rotate
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError
from crossval.formats import to_bf16, to_f16
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import TernaryMatrix
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord, TapArray
from tests.support.numpy_bitnet.main import Build, MainEngine

PASSES = ((5, 90, 17, 299, 4, 63, 120), (8,), (33, 201, 0, 7, 250, 33))
VISIBLE = sorted(set(FAMILIES) - {14})


OF_LLAMA = {
    "pairs of halves",
    "frequency factors skipped",
    "frequency factors multiplied",
    "linear scaling skipped",
    "linear scaling inverted",
    "bias skipped",
    "bias added twice",
    "bias subtracted",
    "bias times the weight scale",
    "bias {}",
    ".scale skipped",
    ".scale applied twice",
    ".scale inverted",
    "rows not permuted for interleaved RoPE",
}
"""Need what only llama has, or is allowed to have."""
OF_EMBEDDING_MODELS = {
    *(variant.name for variant in embedding_models.VARIANTS),
    "post norm after the residual",
    "scaled again",
    "GELU by a table",
    "SiLU by a table",
    "GELU (sigmoid) by a table",
}
"""Need what only qwen3 or gemma3 have."""


def recorded(path, passes=PASSES):
    weights = SpecWeights(path)
    table = op_table(weights.config)
    with SpecRunner(path) as runner:
        return weights, table, [runner.eval(tokens, [op.output for op in table]) for tokens in passes]


@pytest.fixture(scope="module")
def model(make_model):
    return recorded(make_model(n_layers=3, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256))


def living(table, records, weights, n_passes=3):
    """Return the ids of the variants that change the result of some operation."""
    alive = set()
    for op in table:
        for index in range(n_passes):
            context = of_records(op, records, weights.config, weights, index=index)
            for variant in VARIANTS:
                if id(variant) in alive:
                    continue
                for one in variant.candidates(context):
                    with np.errstate(all="ignore"):
                        result = one.compute(context)
                    if result is not None and not np.allclose(result, context.expected, rtol=1e-6):
                        alive.add(id(variant))
                        break
    return alive


@pytest.fixture(scope="module")
def context_of(model):
    weights, table, records = model

    def make(name: str, index: int = 0) -> Context:
        (op,) = (op for op in table if op.output == name)
        return of_records(op, records, weights.config, weights, index=index)

    return make


def outputs(context, name):
    found = [c for late in (False, True) for c in candidates(context, deferred=late) if c.name == name]
    computed = [c.compute(context) for c in found]
    return [result for result in computed if result is not None]


def output(context, name):
    results = outputs(context, name)
    assert len(results) == 1, f"{name}: {len(results)} candidates apply"
    return results[0]


def linear_context(x, signs, scale=0.25, op="q"):
    """A BitLinear of any shape; its output is not used."""
    config = SpecConfig(1, 1, 1, signs.shape[0], x.shape[1], 4 * x.shape[1], 300, 64, 10000.0, 1e-5)
    (row,) = (o for o in op_table(config) if o.output == f"blk.0.{op}")
    plan = PassPlan("prefill", tuple(range(len(x))), 0)
    weights = {row.weights[0]: TernaryMatrix(signs.astype(np.float32), scale)}
    recorded = np.zeros((len(x), signs.shape[0]), np.float32)
    return Context(row, config, weights, plan, tuple(range(len(x))), (x.astype(np.float32),), recorded)


class TestTable:
    def test_families_that_one_operation_can_show_all_have_variants(self):
        assert sorted({variant.family for variant in VARIANTS}) == VISIBLE

    def test_every_variant_applies_to_operations_that_exist(self):
        for variant in VARIANTS:
            assert variant.ops
            assert variant.ops <= EVERY_OP, variant.name

    def test_one_name_is_one_mistake(self, model, context_of):
        """Forms of the same mistake share their name, and then all of its description."""
        _, table, _ = model
        for op in table:
            context = context_of(op.output, 2)
            both = [c for late in (False, True) for c in candidates(context, deferred=late)]
            said = {(c.name, c.group, c.variant.family, c.explanation) for c in both}
            assert [name for name, n in Counter(name for name, *_ in said).items() if n > 1] == []

    @pytest.mark.parametrize(
        "shape",
        [
            {"sub_norms": False},
            {"n_heads": 1, "n_kv_heads": 1},
            {"n_heads": 2, "n_kv_heads": 2, "untied_head": True},
            {"n_layers": 1, "hidden_dim": 128},
            {"arch": "llama", "biases": True, "rope_freqs": True, "scales": True, "rope_scaling": 4.0},
            {"arch": "llama", "rope_scaling": 2.0},
        ],
    )
    def test_every_variant_fits_every_model(self, make_model, shape):
        """Functions are called directly: exceptions that ``compute`` would swallow are errors here."""
        path = make_model(**shape)
        weights = SpecWeights(path)
        table = op_table(weights.config)
        with SpecRunner(path) as runner:
            records = [runner.eval(tokens, [op.output for op in table]) for tokens in PASSES]
        for op in table:
            for index in range(len(PASSES)):
                context = of_records(op, records, weights.config, weights, index=index)
                for one in [c for late in (False, True) for c in candidates(context, deferred=late)]:
                    try:
                        with np.errstate(all="ignore"):
                            result = one.variant.function(context, *one.arguments)
                    except Inapplicable:
                        continue
                    assert result.shape == context.target.shape, one.name

    def test_every_operation_has_variants(self, model, context_of):
        _, table, _ = model
        for op in table:
            assert sum(1 for _ in candidates(context_of(op.output))) >= 10, op.name

    def test_sentences_are_filled_in(self, model, context_of):
        _, table, _ = model
        for op in table:
            for one in candidates(context_of(op.output, 2)):
                assert "{" not in one.name + one.explanation
                assert one.explanation
                assert not one.explanation.endswith(".")

    def test_no_variant_is_dead(self, model):
        """Each gives a finite-or-NaN output of the correct shape somewhere, other than the specification's."""
        weights, table, records = model
        alive = living(table, records, weights)
        dead = {variant.name for variant in VARIANTS if id(variant) not in alive}
        # these need ties, saturated sums, another file, or what a broken engine leaves; tested below
        assert dead == {
            "round half up",
            "round half away from zero",
            "round half to even",
            "all-zero activation row",
            "squared ReLU",
            "16-bit lanes wrap",
            "16-bit lanes saturate",
            "16-bit sum wraps",
            "16-bit sum saturates",
            "head of {}",
            "head table F32 rounded to F16",
            "F16 rounding of {} missing",
            "F16 rounding of {} added",
            "F16 rounding missing",
            "weights of {}",  # of layers farther than the next ones
            "{} stale",
            "{0.rule.words} zero",
            "rows of token ids {} zero",
            "embedding rows of all tokens read as zeros",
            "sliding window of {}",
            "embedding rows of {0.rule.words} read as zeros",
            *OF_LLAMA,
            *OF_EMBEDDING_MODELS,
            *({"{} zero", "{} never written", "weight rows of {} read as zeros"} & dead),
        }

    def test_no_variant_of_llama_is_dead(self, make_model):
        more = {"biases": True, "rope_freqs": True, "scales": True, "rope_scaling": 4.0}
        weights, table, records = recorded(make_model(n_heads=4, n_kv_heads=2, arch="llama", **more))
        alive = living(table, records, weights)
        assert {variant.name for variant in VARIANTS if id(variant) in alive} >= OF_LLAMA

    def test_no_variant_of_embedding_models_is_dead(self, make_model):
        alive = set()
        for pooling in ("mean", "last"):
            more = {"arch": "gemma3", "head_dim": 128, "pooling": pooling, "vocab_size": 400}
            weights, table, records = recorded(make_model(dim=384, n_heads=4, n_kv_heads=2, **more), PASSES[:1])
            alive |= living(table, records, weights, 1)
        dead = {one.name for one in VARIANTS if one.name in OF_EMBEDDING_MODELS and id(one) not in alive}
        assert dead == set()

    def test_documentation_is_current(self):
        page = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
        assert page.read_text() == variants_markdown(), "python -m crossval.diagnose.variants > docs/variants.md"


class TestContext:
    def test_expected_is_the_specification(self, model, context_of):
        weights, table, _ = model
        for op in table:
            for index in range(len(PASSES)):
                context = context_of(op.output, index)
                values = dict(zip(op.inputs, context.raw, strict=True))
                right = context.flat(op.apply(values, weights))
                np.testing.assert_allclose(context.expected, right, rtol=1e-12, atol=1e-12)

    def test_features_looked_at_are_those_of_the_whole(self, context_of):
        context = context_of("blk.1.ffn_down")
        some = np.array([3, 77, 12])
        for one in candidates(context):
            if one.variant.family in (1, 2, 3, 4, 5, 10):
                whole, part = one.compute(context), one.compute(context.sampled(some))
                if whole is not None:
                    np.testing.assert_allclose(part, whole[:, some], rtol=1e-5, atol=1e-7, err_msg=one.name)

    def test_inputs_are_cut_to_the_rows_of_the_output(self, model):
        weights, table, records = model
        (op,) = (op for op in table if op.output == "blk.2.l_out")
        last = {"blk.2.l_out": TapArray(records[0].taps["blk.2.l_out"].array[-1:], (6,))}
        record = PassRecord(records[0].plan, {**records[0].taps, **last})
        context = of_records(op, [record], weights.config, weights)
        assert [array.shape[0] for array in context.raw] == [1, 1]
        assert context.positions.tolist() == [6]
        np.testing.assert_allclose(context.expected, context.target, rtol=1e-6)

    def test_cache_holds_all_passes(self, context_of):
        context = context_of("blk.0.kq", 2)
        assert context.raw[1].shape[0] == sum(map(len, PASSES))
        assert context.start == 8

    @pytest.mark.parametrize("missing", ["blk.0.kq", "blk.0.q_rope"])
    def test_missing_arrays_are_named(self, model, missing):
        weights, table, records = model
        (op,) = (op for op in table if op.output == "blk.0.kq")
        taps = {name: tap for name, tap in records[0].taps.items() if name != missing}
        with pytest.raises(BadInputError, match=r"blk\.0\.kq"):
            of_records(op, [PassRecord(records[0].plan, taps)], weights.config, weights)


class TestWeightLayout:
    def test_bytes_are_those_of_the_format(self):
        codes = np.random.default_rng(0).integers(0, 3, (5, 384)).astype(np.uint8)
        np.testing.assert_array_equal(
            packed(codes.astype(np.float32) - 1).reshape(-1), pack_codes(codes).reshape(-1)
        )

    def test_right_decoding_gives_the_codes_back(self):
        codes = np.random.default_rng(1).integers(0, 3, (3, 256))
        np.testing.assert_array_equal(strided(packed(codes - 1.0), 128, SHIFTS), codes)

    def test_sequential_by_hand(self):
        data = np.array([[0b10_01_00_01, 0b00_10_10_01]], np.uint8)
        np.testing.assert_array_equal(sequential(data, SHIFTS), [[2, 1, 0, 1, 0, 2, 2, 1]])
        np.testing.assert_array_equal(sequential(data, SHIFTS[::-1]), [[1, 0, 1, 2, 1, 2, 2, 0]])

    def test_block_of_64_by_hand(self):
        """Byte p of 16 holds p, 16 + p, 32 + p, 48 + p."""
        data = np.zeros((1, 16), np.uint8)
        data[0, 5] = 0b10_01_00_01
        codes = strided(data, 64, SHIFTS)[0]
        assert {i: int(codes[i]) for i in np.flatnonzero(codes)} == {5: 2, 21: 1, 53: 1}

    def test_transposed_square_matrix_is_its_transpose(self):
        rng = np.random.default_rng(2)
        x, signs = rng.normal(size=(3, 128)), rng.integers(-1, 2, (128, 128))
        wrong = output(linear_context(x, signs), "weights transposed")
        np.testing.assert_allclose(wrong, linear(linear_context(x, signs.T)), rtol=1e-12)

    def test_own_scale_is_not_a_mistake(self, context_of):
        context = context_of("blk.1.q")
        names = [one.name for one in candidates(context)]
        assert "scale of blk.1.attn_q.weight" not in names
        assert "scale of blk.1.attn_k.weight" in names


class TestQuantizer:
    def test_an_all_zero_row_becomes_nan_and_no_other(self):
        x = np.zeros((3, 128))
        x[1, 0] = 3.0
        signs = np.ones((4, 128))
        wrong = output(linear_context(x, signs), "all-zero activation row")
        assert np.isnan(wrong).all(axis=-1).tolist() == [True, False, True]
        np.testing.assert_allclose(wrong[1], 0.75, rtol=1e-6)
        assert outputs(linear_context(x[1:2], signs), "all-zero activation row") == []

    def test_halves_go_to_even_only_against_an_arithmetic_that_rounds_them_away(self):
        x = np.array([[127.0, 0.5, 1.5, -2.5] + [0.0] * 124])
        context = linear_context(x, np.ones((4, 128)), scale=1.0)
        assert outputs(context, "round half to even") == []
        stated = replace(context, quantizer="main")
        assert stated.expected[0, 0] == 127 + 1 + 2 - 3
        assert output(stated, "round half to even")[0, 0] == 127 + 0 + 2 - 2

    def test_rounding_at_ties(self):
        """A row whose largest value is 127 is scaled by 1, so halves are ties."""
        x = np.array([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5] + [0.0] * 122])
        context = linear_context(x, np.eye(128)[:6], scale=1.0)
        assert linear(context)[0].tolist() == [127, 0, 2, 0, -2, 2]
        assert output(context, "round half up")[0].tolist() == [127, 1, 2, 0, -1, 3]
        assert output(context, "round half away from zero")[0].tolist() == [127, 1, 2, -1, -2, 3]
        assert output(context, "truncation")[0].tolist() == [127, 0, 1, 0, -1, 2]
        assert output(context, "rounded down")[0].tolist() == [127, 0, 1, -1, -2, 2]
        assert output(context, "no activation quantisation")[0].tolist() == [127, 0.5, 1.5, -0.5, -1.5, 2.5]
        assert half_away(np.array([0.49999999999999994, -0.5])).tolist() == [0.0, -1.0]

    def test_scales_by_hand(self):
        x = np.array([[12.7, 1.0] + [0.0] * 126, [1.27, 0.1] + [0.0] * 126])
        context = linear_context(x, np.eye(128)[:2], scale=2.0)
        np.testing.assert_allclose(linear(context), 2 * x[:, :2], rtol=1e-6)
        # one scale of 10: the second row's codes are 13 and 1
        np.testing.assert_allclose(output(context, "per-tensor absmax")[1], [2.6, 0.2], rtol=1e-6)
        np.testing.assert_allclose(output(context, "input scale 1.0")[0], [26, 2], rtol=1e-6)
        np.testing.assert_allclose(output(context, "input scale not undone")[0], [254, 20], rtol=1e-6)
        wrong = output(context, "sums rescaled by the first row's input scale")
        np.testing.assert_allclose(wrong[1], 20 * x[1, :2], rtol=1e-6)

    @pytest.mark.parametrize(
        ("name", "limit"),
        [
            ("16-bit lanes wrap", lambda v: (v + 32768) % 65536 - 32768),
            ("16-bit lanes saturate", lambda v: min(max(v, -32768), 32767)),
        ],
    )
    def test_lanes_against_a_loop(self, name, limit):
        """bitnet.cpp: lane l of 16 collects elements 2l and 2l+1 of every 32, widened every 4096 elements."""
        rng = np.random.default_rng(3)
        x = np.ones((2, 4224))
        x[1] = rng.uniform(-1, 1, 4224)
        signs = rng.choice([-1, 0, 1], (3, 4224), p=[0.1, 0.2, 0.7])
        context = linear_context(x, signs, scale=1.0)
        wrong = output(context, name)
        codes = context.quantized[0].astype(int)
        for token in range(2):
            for row in range(3):
                total = 0
                for first in range(0, 4224, 4096):
                    lanes = [0] * 16
                    for i in range(first, min(first + 4096, 4224)):
                        lanes[i % 32 // 2] += int(codes[token, i]) * (int(signs[row, i]) + 1)
                    total += sum(map(limit, lanes))
                total -= int(codes[token].sum())
                assert wrong[token, row] * context.quantized[1][token, 0] == pytest.approx(total)
        assert not np.allclose(wrong, linear(context))

    def test_sums_in_16_bits(self):
        context = linear_context(np.ones((1, 512)), np.ones((1, 512)), scale=1.0)
        scale = context.quantized[1][0, 0]
        signed = 512 * 127 - 65536
        raw = (512 * 2 * 127) % 65536 - 512 * 127  # codes 2 for weights +1; 130048 wraps to -1024
        wrapped = [w[0, 0] * scale for w in outputs(context, "16-bit sum wraps")]
        assert wrapped == pytest.approx([signed, raw - 65536])
        saturated = [w[0, 0] * scale for w in outputs(context, "16-bit sum saturates")]
        assert saturated == pytest.approx([32767, 32767 - 512 * 127])


class TestFormulas:
    def test_activations_at_known_points(self):
        np.testing.assert_allclose(silu(np.array([0.0, 1.0, -2.0])), [0, 0.7310585786, -0.2384058440], rtol=1e-9)
        np.testing.assert_allclose(gelu(np.array([0.0, 1.0, -2.0])), [0, 0.8413447461, -0.0455002639], rtol=1e-8)
        np.testing.assert_allclose(gelu_tanh(np.array([1.0])), [0.8411919906], rtol=1e-9)

    def test_interleaved_rotation_is_complex_multiplication(self):
        rng = np.random.default_rng(4)
        x, angle = rng.normal(size=(3, 2, 8)), rng.normal(size=(3, 1, 4))
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        wrong = rotate(x, angle, "adjacent")
        np.testing.assert_allclose(wrong[..., 0::2] + 1j * wrong[..., 1::2], turned, rtol=1e-12)
        split = rotate(x, angle, "adjacent", "halves")
        np.testing.assert_allclose(split[..., :4] + 1j * split[..., 4:], turned, rtol=1e-12)

    def test_layer_norm_of_a_centred_row_is_rms_norm(self, context_of):
        context = context_of("blk.1.attn_norm")
        centred = context.raw[0] - context.raw[0].mean(axis=-1, keepdims=True)
        moved = replace(context, raw=(centred,))
        np.testing.assert_allclose(output(moved, "LayerNorm"), moved.expected, rtol=1e-5)
        assert not np.allclose(output(context, "LayerNorm"), context.expected, rtol=1e-3)

    def test_formats(self):
        x = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -3.14159])
        assert to_bf16(x).tolist() == [1.0, 1.0, 1.015625, -3.140625]
        assert truncate_bf16(x).tolist() == [1.0, 1.0, 1.0078125, -3.140625]
        assert f16_read_as_bf16(np.array([1.0, 2.0])).tolist() == [2.0**-7, 2.0]
        row = np.concatenate([[127.0, 63.6, 1.4], np.zeros(29)])
        assert to_q8_0(row)[:3].tolist() == [127.0, 64.0, 1.0]

    def test_tiled_heads_read_other_keys(self, context_of):
        context = context_of("blk.0.kq")
        q, k = context.inputs
        wrong = output(context, "GQA heads tiled")
        for head in range(4):
            np.testing.assert_allclose(wrong[head], q[:, head] @ k[:, head % 2].T, rtol=1e-12)

    def test_a_single_cell_is_exchanged_exactly(self, context_of):
        context = context_of("blk.0.kqv_out", 1)
        cells = context.inputs[1].copy()
        cells[3] = 0.0
        wrong = output(context, "cell 3 holds zeros")
        np.testing.assert_allclose(wrong, context.op.function(context.inputs[0], cells), rtol=1e-12, atol=1e-15)

    def test_mask_that_hides_a_token_from_itself(self, context_of):
        context = context_of("blk.0.kq_soft_max")
        wrong = output(context, "mask off by one: a token does not see itself (NaN)")
        assert np.isnan(wrong[:, 0]).all()
        np.testing.assert_allclose(wrong[:, 1], [[1, 0, 0, 0, 0, 0, 0]] * 4)
        np.testing.assert_allclose(wrong[:, 1:].sum(axis=-1), 1.0)

    def test_softmax_over_other_axes_sums_to_one_there(self, context_of):
        context = context_of("blk.0.kq_soft_max")
        np.testing.assert_allclose(output(context, "softmax over queries").sum(axis=1), 1.0)
        over_heads = output(context, "softmax over heads")
        np.testing.assert_allclose(over_heads.sum(axis=0), np.tril(np.ones((7, 7))))

    def test_untied_head_has_the_other_table_as_a_mistake(self, make_model):
        weights = SpecWeights(make_model(untied_head=True))
        op = op_table(weights.config)[-1]
        x = np.random.default_rng(5).normal(size=(1, weights.config.dim)).astype(np.float32)
        plan = PassPlan("prefill", (1,), 0)
        context = Context(op, weights.config, weights, plan, (0,), (x,), np.zeros((1, 300), np.float32))
        wrong = output(context, "head of token_embd.weight")
        np.testing.assert_allclose(wrong, x @ weights["token_embd.weight"].astype(np.float64).T, rtol=1e-9)


class TestSumsInBinary16:
    @pytest.mark.parametrize("n", [128, 300, 512])
    def test_they_are_those_of_an_engine_that_adds_so(self, n):
        engine = object.__new__(MainEngine)
        engine.build = Build(16, binary16=True)
        rng = np.random.default_rng(n)
        x, y = (to_f16(rng.normal(size=(50, n))) for _ in range(2))
        found = narrow_sums.in_lanes(x, y)
        np.testing.assert_array_equal(found.astype(np.float32), engine.single(x, y))
        assert not np.allclose(found, np.sum(x * y, axis=-1), rtol=1e-4, atol=1e-4)

    def test_batches_are_not_added_so(self, context_of):
        assert outputs(context_of("blk.0.kqv_out", 0), "sums in binary16") == []
        assert len(outputs(context_of("result_output", 0), "sums in binary16")) == 1
