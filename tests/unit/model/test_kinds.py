"""Each formula against numbers worked out by hand or loops written from the definition."""

import ast
import inspect
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crossval.model import config, graphs, kinds, op, weights
from crossval.model.graphs import bitnet
from crossval.model.kinds import TernaryMatrix

rows_of_floats = arrays(np.float64, (3, 16), elements=st.floats(-100, 100, allow_subnormal=False))


class TestRmsNorm:
    def test_hand_computed_row(self):
        # mean square (9 + 16) / 2 = 12.5; root with eps 3.5 is 4
        y = kinds.rms_norm(np.array([[3.0, 4.0]]), np.array([2.0, 0.5]), eps=3.5)
        np.testing.assert_array_equal(y, [[1.5, 0.5]])

    @given(rows_of_floats, st.floats(0.01, 100))
    def test_scaling_the_input_changes_nothing_without_eps(self, x, factor):
        x[:, 0] = 1.0  # no zero row
        w = np.linspace(0.5, 2, 16)
        np.testing.assert_allclose(
            kinds.rms_norm(x * factor, w, eps=0.0), kinds.rms_norm(x, w, eps=0.0), rtol=1e-12
        )

    @given(rows_of_floats)
    def test_output_has_unit_mean_square(self, x):
        x[:, 0] = 1.0
        y = kinds.rms_norm(x, np.ones(16), eps=0.0)
        np.testing.assert_allclose(np.mean(y * y, axis=-1), 1.0, rtol=1e-12)

    def test_does_not_subtract_the_mean(self):
        assert kinds.rms_norm(np.full((1, 4), 7.0), np.ones(4), eps=0.0).tolist() == [[1.0] * 4]

    def test_zero_row_stays_zero(self):
        assert not kinds.rms_norm(np.zeros((1, 4)), np.ones(4), eps=1e-5).any()


class TestQuantizer:
    def test_hand_computed_row_rounds_half_to_even(self):
        # absmax 127: scale 1, so the ties are exact
        codes, scale = kinds.quantize_activations(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49]]))
        assert scale.tolist() == [[1.0]]
        assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]
        assert codes.dtype == np.int8

    def test_each_token_has_its_own_scale(self):
        codes, scale = kinds.quantize_activations(np.array([[1.0, -2.0], [100.0, 25.0]]))
        assert scale[:, 0].tolist() == [63.5, 1.27]
        assert codes.tolist() == [[64, -127], [127, 32]]

    def test_tiny_rows_are_divided_by_the_floor_not_by_their_maximum(self):
        codes, scale = kinds.quantize_activations(np.array([[1e-6, -1e-6], [0.0, 0.0]]))
        np.testing.assert_allclose(scale, 127e5, rtol=1e-15)
        assert codes.tolist() == [[13, -13], [0, 0]]

    @given(rows_of_floats)
    def test_codes_are_within_half_a_step_and_reach_the_end(self, x):
        x[:, 3] = 101.0  # above every other element
        codes, scale = kinds.quantize_activations(x)
        assert np.all(np.abs(codes - x * scale) <= 0.5)
        assert np.all(codes[:, 3] == 127)
        assert codes.min() >= -127

    def test_nan_survives(self):
        weight = TernaryMatrix(np.ones((2, 2), np.float32), 1.0)
        y = kinds.bitlinear(np.array([[np.nan, 1.0], [1.0, 1.0]]), weight)
        assert np.isnan(y[0]).all()
        assert np.isfinite(y[1]).all()


class TestBitLinear:
    def test_hand_computed(self):
        # row maxima 127 and 254: codes (127, 10) and (127, 3), scales 1 and 0.5
        x = np.array([[127.0, 10.0], [254.0, 5.0]])
        weight = TernaryMatrix(np.array([[1, -1], [0, 1], [-1, 0]], np.float32), 0.25)
        # 5 * 0.5 = 2.5 rounds to 2
        expected = [[117 * 0.25, 10 * 0.25, -127 * 0.25], [125 / 0.5 * 0.25, 2 / 0.5 * 0.25, -127 / 0.5 * 0.25]]
        np.testing.assert_array_equal(kinds.bitlinear(x, weight), expected)

    @pytest.mark.parametrize("cols", [128, 6912, 131071, 131072, 140000])
    def test_sums_are_exact_at_the_largest_magnitudes(self, cols):
        rng = np.random.default_rng(cols)
        # Nearly every product is +127: from 132104 columns on, sums leave what float32 can hold.
        codes = rng.choice(np.array([-128, 126, 127], np.int8), (2, cols), p=[0.0001, 0.01, 0.9899])
        signs = rng.choice(np.array([-1, 0, 1], np.int8), (3, cols), p=[0.0001, 0.0001, 0.9998])
        exact = codes.astype(np.int64) @ signs.T.astype(np.int64)
        assert kinds.accumulate(codes, TernaryMatrix(signs.astype(np.float32), 1.0)).tolist() == exact.tolist()

    def test_heads_are_consecutive_rows(self):
        x = np.array([[127.0, 1.0]])
        weight = TernaryMatrix(np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32), 1.0)
        assert kinds.bitlinear(x, weight, n_heads=2).tolist() == [[[127, 1], [-127, -1]]]


class TestRope:
    def test_matches_a_loop_over_the_definition(self):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(3, 2, 6))
        positions = np.array([0, 5, 1000])
        expected = np.empty_like(x)
        for t in range(3):
            for h in range(2):
                for i in range(3):
                    angle = int(positions[t]) * 500000.0 ** (-2 * i / 6)
                    a, b = x[t, h, i], x[t, h, i + 3]
                    expected[t, h, i] = a * math.cos(angle) - b * math.sin(angle)
                    expected[t, h, i + 3] = a * math.sin(angle) + b * math.cos(angle)
        np.testing.assert_allclose(kinds.rope(x, positions, base=500000.0), expected, rtol=0, atol=1e-12)

    def test_position_zero_is_the_identity(self):
        x = np.random.default_rng(2).normal(size=(1, 2, 8))
        np.testing.assert_array_equal(kinds.rope(x, np.array([0]), base=10000.0), x)

    @given(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 4096))
    @settings(max_examples=50)
    def test_keeps_norms_and_scores_depend_on_distance_only(self, i, j, shift):
        q, k = np.random.default_rng(3).normal(size=(2, 1, 1, 16))

        def score(q_position, k_position):
            rotated_q = kinds.rope(q, np.array([q_position]), base=500000.0)
            np.testing.assert_allclose(np.linalg.norm(rotated_q), np.linalg.norm(q), rtol=1e-13)
            return kinds.attention_scores(rotated_q, kinds.rope(k, np.array([k_position]), base=500000.0)).item()

        assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-9)


class TestAttention:
    def test_matches_loops_over_heads_tokens_and_keys(self):
        rng = np.random.default_rng(4)
        n_tokens, n_kv, n_heads, n_kv_heads, head_dim = 3, 5, 6, 2, 4
        q = rng.normal(size=(n_tokens, n_heads, head_dim))
        k, v = rng.normal(size=(2, n_kv, n_kv_heads, head_dim))
        positions = np.arange(n_kv - n_tokens, n_kv)
        scale = 1 / math.sqrt(head_dim)
        kq = kinds.attention_scores(q, k)
        p = kinds.causal_softmax(kq, positions, scale=scale)
        out = kinds.attend(p, v)
        assert kq.shape == p.shape == (n_heads, n_tokens, n_kv)
        for h in range(n_heads):
            g = h // 3  # 6 query heads over 2 key heads: 0,0,0,1,1,1
            for t in range(n_tokens):
                scores = [float(q[t, h] @ k[s, g]) for s in range(n_kv)]
                np.testing.assert_allclose(kq[h, t], scores, rtol=1e-12)
                seen = [math.exp(scores[s] * scale) if s <= positions[t] else 0.0 for s in range(n_kv)]
                np.testing.assert_allclose(p[h, t], np.array(seen) / sum(seen), rtol=1e-12, atol=0)
                merged = sum(seen[s] / sum(seen) * v[s, g] for s in range(n_kv))
                np.testing.assert_allclose(out[t, h * head_dim : (h + 1) * head_dim], merged, rtol=1e-11)

    @given(arrays(np.float64, (2, 3, 5), elements=st.floats(-3000, 3000)))
    def test_softmax_rows_sum_to_one_and_hide_the_future(self, scores):
        positions = np.array([2, 3, 4])
        p = kinds.causal_softmax(scores, positions, scale=0.5)
        np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=1e-12)
        for t, position in enumerate(positions):
            assert not p[:, t, position + 1 :].any()

    def test_first_token_sees_only_itself(self):
        p = kinds.causal_softmax(np.zeros((1, 2, 2)), np.array([0, 1]), scale=1.0)
        assert p.tolist() == [[[1.0, 0.0], [0.5, 0.5]]]


class TestElementwise:
    def test_squared_relu(self):
        assert kinds.squared_relu(np.array([-3.0, 0.0, 0.5, 3.0])).tolist() == [0.0, 0.0, 0.25, 9.0]

    def test_embedding_rows_by_token(self):
        table = np.arange(12, dtype=np.float16).reshape(4, 3)
        assert kinds.embed(np.array([2, 0, 2]), table).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]

    @pytest.mark.parametrize("chunk", [1, 3, 10, 4096])
    def test_head_is_one_product_whatever_the_chunk(self, chunk, monkeypatch):
        monkeypatch.setattr(kinds, "HEAD_CHUNK_ROWS", chunk)
        rng = np.random.default_rng(5)
        x, table = rng.normal(size=(2, 6)), rng.normal(size=(10, 6)).astype(np.float16)
        expected = [[sum(a * float(b) for a, b in zip(xr, tr, strict=True)) for tr in table] for xr in x]
        np.testing.assert_allclose(kinds.head(x, table), expected, rtol=1e-12)


def test_the_fields_of_a_kind_are_the_keywords_of_its_formula():
    for kind in kinds.KINDS:
        parameters = inspect.signature(kind.formula).parameters.values()
        keywords = {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
        assert keywords == {f.name for f in fields(kind)}, kind


def test_no_code_is_shared_with_the_engine():
    imported = set()
    for module in (config, graphs, bitnet, kinds, op, weights):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name.startswith("bitnet_py")} == {
        "bitnet_py.config", "bitnet_py.errors", "bitnet_py.gguf"
    }  # fmt: skip
    ours = ("crossval.model", "crossval.errors", "crossval.formats")
    assert all(name.startswith(ours) for name in imported if "crossval" in name)
