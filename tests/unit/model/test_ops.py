"""Each operation against numbers worked out by hand or loops written from the definition; then the whole table."""

import ast
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crossval.model import ops, taps
from crossval.model import weights as spec_weights
from crossval.model.ops import KVState, SpecConfig, TernaryMatrix

CONFIG = SpecConfig(
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    dim=32,
    hidden_dim=48,
    vocab_size=50,
    context_length=64,
    rope_base=10000.0,
    rms_eps=1e-5,
)

rows_of_floats = arrays(np.float64, (3, 16), elements=st.floats(-100, 100, allow_subnormal=False))


def random_weights(config: SpecConfig, seed: int = 0) -> dict[str, ops.Weight]:
    """Weights for every tensor the table names, shaped by what the op's function needs."""
    rng = np.random.default_rng(seed)
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "attn_q": (q_dim, config.dim),
        "attn_k": (kv_dim, config.dim),
        "attn_v": (kv_dim, config.dim),
        "attn_output": (config.dim, q_dim),
        "ffn_gate": (config.hidden_dim, config.dim),
        "ffn_up": (config.hidden_dim, config.dim),
        "ffn_down": (config.dim, config.hidden_dim),
    }
    norms = {"attn_sub_norm": q_dim, "ffn_sub_norm": config.hidden_dim}
    weights: dict[str, ops.Weight] = {}
    for op in ops.op_table(config):
        for name in op.weights:
            tensor = name.split(".")[-2]
            if tensor in shapes:
                signs = rng.integers(-1, 2, shapes[tensor]).astype(np.float32)
                weights[name] = TernaryMatrix(signs, float(rng.uniform(0.02, 0.1)))
            elif tensor in ("token_embd", "output"):
                weights[name] = rng.normal(size=(config.vocab_size, config.dim)).astype(np.float16)
            else:
                weights[name] = rng.uniform(0.5, 1.5, norms.get(tensor, config.dim))
    return weights


def run(config, weights, token_ids, state=None):
    state = KVState() if state is None else state
    return {op.output: out for op, out in ops.forward(ops.op_table(config), weights, token_ids, state)}


class TestRmsNorm:
    def test_hand_computed_row(self):
        # mean square (9 + 16) / 2 = 12.5; root with eps 3.5 is 4
        y = ops.rms_norm(np.array([[3.0, 4.0]]), np.array([2.0, 0.5]), eps=3.5)
        np.testing.assert_array_equal(y, [[1.5, 0.5]])

    @given(rows_of_floats, st.floats(0.01, 100))
    def test_scaling_the_input_changes_nothing_without_eps(self, x, factor):
        x[:, 0] = 1.0  # no zero row
        w = np.linspace(0.5, 2, 16)
        np.testing.assert_allclose(ops.rms_norm(x * factor, w, eps=0.0), ops.rms_norm(x, w, eps=0.0), rtol=1e-12)

    @given(rows_of_floats)
    def test_output_has_unit_mean_square(self, x):
        x[:, 0] = 1.0
        y = ops.rms_norm(x, np.ones(16), eps=0.0)
        np.testing.assert_allclose(np.mean(y * y, axis=-1), 1.0, rtol=1e-12)

    def test_does_not_subtract_the_mean(self):
        assert ops.rms_norm(np.full((1, 4), 7.0), np.ones(4), eps=0.0).tolist() == [[1.0] * 4]

    def test_zero_row_stays_zero(self):
        assert not ops.rms_norm(np.zeros((1, 4)), np.ones(4), eps=1e-5).any()


class TestQuantizer:
    def test_hand_computed_row_rounds_half_to_even(self):
        # absmax 127: scale 1, so the ties are exact
        codes, scale = ops.quantize_activations(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49]]))
        assert scale.tolist() == [[1.0]]
        assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]
        assert codes.dtype == np.int8

    def test_each_token_has_its_own_scale(self):
        codes, scale = ops.quantize_activations(np.array([[1.0, -2.0], [100.0, 25.0]]))
        assert scale[:, 0].tolist() == [63.5, 1.27]
        assert codes.tolist() == [[64, -127], [127, 32]]

    def test_tiny_rows_are_divided_by_the_floor_not_by_their_maximum(self):
        codes, scale = ops.quantize_activations(np.array([[1e-6, -1e-6], [0.0, 0.0]]))
        np.testing.assert_allclose(scale, 127e5, rtol=1e-15)
        assert codes.tolist() == [[13, -13], [0, 0]]

    @given(rows_of_floats)
    def test_codes_are_within_half_a_step_and_reach_the_end(self, x):
        x[:, 3] = 101.0  # above every other element
        codes, scale = ops.quantize_activations(x)
        assert np.all(np.abs(codes - x * scale) <= 0.5)
        assert np.all(codes[:, 3] == 127)
        assert codes.min() >= -127

    def test_nan_survives(self):
        weight = TernaryMatrix(np.ones((2, 2), np.float32), 1.0)
        y = ops.bitlinear(np.array([[np.nan, 1.0], [1.0, 1.0]]), weight)
        assert np.isnan(y[0]).all()
        assert np.isfinite(y[1]).all()


class TestBitLinear:
    def test_hand_computed(self):
        # row maxima 127 and 254: codes (127, 10) and (127, 3), scales 1 and 0.5
        x = np.array([[127.0, 10.0], [254.0, 5.0]])
        weight = TernaryMatrix(np.array([[1, -1], [0, 1], [-1, 0]], np.float32), 0.25)
        # 5 * 0.5 = 2.5 rounds to 2
        expected = [[117 * 0.25, 10 * 0.25, -127 * 0.25], [125 / 0.5 * 0.25, 2 / 0.5 * 0.25, -127 / 0.5 * 0.25]]
        np.testing.assert_array_equal(ops.bitlinear(x, weight), expected)

    @pytest.mark.parametrize("cols", [128, 6912, 131071, 131072, 140000])
    def test_sums_are_exact_at_the_largest_magnitudes(self, cols):
        rng = np.random.default_rng(cols)
        # Nearly every product is +127: from 132104 columns on, sums leave what float32 can hold.
        codes = rng.choice(np.array([-128, 126, 127], np.int8), (2, cols), p=[0.0001, 0.01, 0.9899])
        signs = rng.choice(np.array([-1, 0, 1], np.int8), (3, cols), p=[0.0001, 0.0001, 0.9998])
        exact = codes.astype(np.int64) @ signs.T.astype(np.int64)
        assert ops.accumulate(codes, TernaryMatrix(signs.astype(np.float32), 1.0)).tolist() == exact.tolist()

    def test_heads_are_consecutive_rows(self):
        x = np.array([[127.0, 1.0]])
        weight = TernaryMatrix(np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32), 1.0)
        assert ops.bitlinear_heads(x, weight, n_heads=2).tolist() == [[[127, 1], [-127, -1]]]


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
        np.testing.assert_allclose(ops.rope(x, positions, base=500000.0), expected, rtol=0, atol=1e-12)

    def test_position_zero_is_the_identity(self):
        x = np.random.default_rng(2).normal(size=(1, 2, 8))
        np.testing.assert_array_equal(ops.rope(x, np.array([0]), base=10000.0), x)

    @given(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 4096))
    @settings(max_examples=50)
    def test_keeps_norms_and_scores_depend_on_distance_only(self, i, j, shift):
        q, k = np.random.default_rng(3).normal(size=(2, 1, 1, 16))

        def score(q_position, k_position):
            rotated_q = ops.rope(q, np.array([q_position]), base=500000.0)
            np.testing.assert_allclose(np.linalg.norm(rotated_q), np.linalg.norm(q), rtol=1e-13)
            return ops.attention_scores(rotated_q, ops.rope(k, np.array([k_position]), base=500000.0)).item()

        assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-9)


class TestAttention:
    def test_matches_loops_over_heads_tokens_and_keys(self):
        rng = np.random.default_rng(4)
        n_tokens, n_kv, n_heads, n_kv_heads, head_dim = 3, 5, 6, 2, 4
        q = rng.normal(size=(n_tokens, n_heads, head_dim))
        k, v = rng.normal(size=(2, n_kv, n_kv_heads, head_dim))
        positions = np.arange(n_kv - n_tokens, n_kv)
        scale = 1 / math.sqrt(head_dim)
        kq = ops.attention_scores(q, k)
        p = ops.causal_softmax(kq, positions, scale=scale)
        out = ops.attend(p, v)
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
        p = ops.causal_softmax(scores, positions, scale=0.5)
        np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=1e-12)
        for t, position in enumerate(positions):
            assert not p[:, t, position + 1 :].any()

    def test_first_token_sees_only_itself(self):
        p = ops.causal_softmax(np.zeros((1, 2, 2)), np.array([0, 1]), scale=1.0)
        assert p.tolist() == [[[1.0, 0.0], [0.5, 0.5]]]


class TestElementwise:
    def test_squared_relu(self):
        assert ops.squared_relu(np.array([-3.0, 0.0, 0.5, 3.0])).tolist() == [0.0, 0.0, 0.25, 9.0]

    def test_embedding_rows_by_token(self):
        table = np.arange(12, dtype=np.float16).reshape(4, 3)
        assert ops.embed(np.array([2, 0, 2]), table).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]

    @pytest.mark.parametrize("chunk", [1, 3, 10, 4096])
    def test_head_is_one_product_whatever_the_chunk(self, chunk, monkeypatch):
        monkeypatch.setattr(ops, "HEAD_CHUNK_ROWS", chunk)
        rng = np.random.default_rng(5)
        x, table = rng.normal(size=(2, 6)), rng.normal(size=(10, 6)).astype(np.float16)
        expected = [[sum(a * float(b) for a, b in zip(xr, tr, strict=True)) for tr in table] for xr in x]
        np.testing.assert_allclose(ops.head(x, table), expected, rtol=1e-12)


class TestTable:
    def test_outputs_are_the_tap_vocabulary_in_order(self):
        assert [op.output for op in ops.op_table(CONFIG)] == taps.all_taps(CONFIG.n_layers)

    def test_every_input_is_there_when_needed(self):
        known = {"token_ids", "positions"}
        for op in ops.op_table(CONFIG):
            assert known.issuperset(op.inputs), op
            known |= {op.output} | ({op.appends_to} if op.appends_to else set())

    def test_models_without_sub_norms_lack_those_ops(self):
        table = ops.op_table(replace(CONFIG, attn_sub_norm=False, ffn_sub_norm=False))
        by_output = {op.output: op for op in table}
        assert not any("sub_norm" in op.output for op in table)
        assert by_output["blk.1.attn_o_out"].inputs == ("blk.1.kqv_out",)
        assert by_output["blk.1.ffn_down"].inputs == ("blk.1.ffn_out",)

    def test_a_separate_head_is_used_when_the_model_has_one(self):
        tied = {op.name: op.weights for op in ops.op_table(CONFIG)}
        separate = {op.name: op.weights for op in ops.op_table(replace(CONFIG, tied_head=False))}
        assert tied["result_output"] == ("token_embd.weight",)
        assert separate["result_output"] == ("output.weight",)

    def test_recorded_float32_inputs_are_computed_in_float64(self):
        op = next(op for op in ops.op_table(CONFIG) if op.name == "ffn_inp")
        values = {name: np.full((1, 2), 0.1, np.float32) for name in op.inputs}
        out = op.apply(values, {})
        assert out.dtype == np.float64
        assert out[0, 0] == 2 * float(np.float32(0.1))


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        (ops, set()),
        (
            spec_weights,
            {"bitnet_py.config", "bitnet_py.errors", "bitnet_py.gguf", "crossval.errors", "crossval.model.ops"},
        ),
    ],
)
def test_no_code_is_shared_with_the_engine(module, allowed):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name.startswith(("bitnet_py", "crossval"))} == allowed


class TestForward:
    @pytest.mark.parametrize("sub_norms", [True, False])
    def test_matches_the_model_written_out_again_for_one_token_at_a_time(self, sub_norms):
        config = replace(CONFIG, attn_sub_norm=sub_norms, ffn_sub_norm=sub_norms)
        weights = random_weights(config)
        token_ids = [3, 14, 15, 9, 26]
        logits = run(config, weights, token_ids)["result_output"]
        np.testing.assert_allclose(logits[0], plain_model(config, weights, token_ids), rtol=1e-9, atol=1e-10)

    def test_prefill_equals_one_by_one(self):
        weights = random_weights(CONFIG)
        token_ids = [1, 7, 7, 30, 49, 0, 2]
        whole = run(CONFIG, weights, token_ids)
        state = KVState()
        steps = [run(CONFIG, weights, [token], state) for token in token_ids]
        assert state.n_tokens == len(token_ids)
        for name in ("blk.0.k_rope", "blk.1.kqv_out", "blk.1.l_out"):
            np.testing.assert_allclose(np.concatenate([s[name] for s in steps]), whole[name], rtol=0, atol=1e-12)
        np.testing.assert_allclose(steps[-1]["result_output"], whole["result_output"], rtol=0, atol=1e-12)

    def test_chunks_equal_the_whole(self):
        weights = random_weights(CONFIG)
        state = KVState()
        run(CONFIG, weights, [1, 2, 3], state)
        second = run(CONFIG, weights, [4, 5], state)
        whole = run(CONFIG, weights, [1, 2, 3, 4, 5])
        assert second["blk.1.kq"].shape == (CONFIG.n_heads, 2, 5)
        np.testing.assert_allclose(second["blk.1.l_out"], whole["blk.1.l_out"][3:], rtol=0, atol=1e-12)

    def test_a_later_token_changes_no_earlier_row(self):
        weights = random_weights(CONFIG)
        a = run(CONFIG, weights, [5, 6, 7, 8])
        b = run(CONFIG, weights, [5, 6, 7, 40])
        assert np.array_equal(a["blk.1.l_out"][:3], b["blk.1.l_out"][:3])
        assert not np.array_equal(a["blk.1.l_out"][3], b["blk.1.l_out"][3])

    def test_an_earlier_token_changes_later_rows(self):
        weights = random_weights(CONFIG)
        a = run(CONFIG, weights, [5, 6, 7, 8])
        b = run(CONFIG, weights, [40, 6, 7, 8])
        assert not np.array_equal(a["result_output"], b["result_output"])

    def test_only_the_last_token_reaches_the_head(self):
        values = run(CONFIG, random_weights(CONFIG), [5, 6, 7])
        assert values["blk.1.l_out"].shape == (3, CONFIG.dim)
        assert values["result_norm"].shape == (1, CONFIG.dim)
        assert values["result_output"].shape == (1, CONFIG.vocab_size)

    def test_values_are_dropped_after_their_last_use(self):
        alive = {}
        steps = ops.forward(ops.op_table(CONFIG), random_weights(CONFIG), [1, 2, 3], KVState())
        for op, output in steps:
            alive[op.output] = weakref.ref(output)
            if op.output == "blk.1.ffn_act":
                break
        del output
        kept = [name for name, ref in alive.items() if ref() is not None]
        assert set(kept) - {"blk.0.k_rope", "blk.0.v", "blk.1.k_rope", "blk.1.v"} == {
            "blk.1.ffn_inp",  # the residual
            "blk.1.ffn_gate",  # read by the op just done
            "blk.1.ffn_up",
            "blk.1.ffn_act",
        }

    def test_an_abandoned_pass_leaves_the_state_as_it_was(self):
        state = KVState()
        weights = random_weights(CONFIG)
        run(CONFIG, weights, [1, 2], state)
        before = {name: array.copy() for name, array in state.arrays.items()}
        for op, _ in ops.forward(ops.op_table(CONFIG), weights, [3], state):
            if op.output == "blk.1.kq":
                break
        assert state.n_tokens == 2
        assert all(np.array_equal(before[name], state.arrays[name]) for name in before)


def plain_model(config, weights, token_ids):
    """The model once more, in loops over tokens and heads, keeping nothing but lists of keys and values."""

    def norm(x, w):
        return [
            xi / math.sqrt(sum(v * v for v in x) / len(x) + config.rms_eps) * wi
            for xi, wi in zip(x, w, strict=True)
        ]

    def linear(x, m):
        s = 127 / max(max(abs(v) for v in x), 1e-5)
        codes = [max(-128, min(127, round(v * s))) for v in x]  # Python rounds half to even
        return [sum(c * int(w) for c, w in zip(codes, row, strict=True)) / s * m.scale for row in m.signs]

    def rotate(x, position):
        half = len(x) // 2
        z = [complex(x[i], x[i + half]) for i in range(half)]
        z = [zi * np.exp(1j * position * config.rope_base ** (-i / half)) for i, zi in enumerate(z)]
        return np.array([v.real for v in z] + [v.imag for v in z])

    def heads(x, n):
        return np.array(x).reshape(n, config.head_dim)

    caches = [([], []) for _ in range(config.n_layers)]
    for position, token in enumerate(token_ids):
        x = [float(v) for v in weights["token_embd.weight"][token]]
        for layer, (keys, values) in enumerate(caches):
            w = {name.split(".")[2]: w for name, w in weights.items() if name.startswith(f"blk.{layer}.")}
            h = norm(x, w["attn_norm"])
            q = heads(linear(h, w["attn_q"]), config.n_heads)
            keys.append([rotate(k, position) for k in heads(linear(h, w["attn_k"]), config.n_kv_heads)])
            values.append(heads(linear(h, w["attn_v"]), config.n_kv_heads))
            merged = []
            for i in range(config.n_heads):
                g = i * config.n_kv_heads // config.n_heads
                rotated = rotate(q[i], position)
                e = [math.exp(float(rotated @ k[g]) / math.sqrt(config.head_dim)) for k in keys]
                merged += list(sum(ei * v[g] for ei, v in zip(e, values, strict=True)) / sum(e))
            if config.attn_sub_norm:
                merged = norm(merged, w["attn_sub_norm"])
            x = [a + b for a, b in zip(x, linear(merged, w["attn_output"]), strict=True)]
            h = norm(x, w["ffn_norm"])
            gate, up = linear(h, w["ffn_gate"]), linear(h, w["ffn_up"])
            h = [max(g, 0.0) ** 2 * u for g, u in zip(gate, up, strict=True)]
            if config.ffn_sub_norm:
                h = norm(h, w["ffn_sub_norm"])
            x = [a + b for a, b in zip(x, linear(h, w["ffn_down"]), strict=True)]
    final = norm(x, weights["output_norm.weight"])
    return [sum(a * float(b) for a, b in zip(final, row, strict=True)) for row in weights["token_embd.weight"]]
