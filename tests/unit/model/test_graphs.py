"""The graph of BitNet: its operations, and the forward pass of running them in order."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest

from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import TernaryMatrix, Weight
from crossval.model.op import KVState, forward

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


def random_weights(config: SpecConfig, seed: int = 0) -> dict[str, Weight]:
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
    weights: dict[str, Weight] = {}
    for op in op_table(config):
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
    return {op.output: out for op, out in forward(op_table(config), weights, token_ids, state)}


class TestTable:
    def test_outputs_are_the_tap_vocabulary_in_order(self):
        assert [op.output for op in op_table(CONFIG)] == taps.of_model(CONFIG.n_layers, CONFIG.architecture)

    def test_every_input_is_there_when_needed(self):
        known = {"token_ids", "positions"}
        for op in op_table(CONFIG):
            assert known.issuperset(op.inputs), op
            known |= {op.output} | ({op.appends_to} if op.appends_to else set())

    def test_models_without_sub_norms_lack_those_ops(self):
        table = op_table(replace(CONFIG, attn_sub_norm=False, ffn_sub_norm=False))
        by_output = {op.output: op for op in table}
        assert not any("sub_norm" in op.output for op in table)
        assert by_output["blk.1.attn_o_out"].inputs == ("blk.1.kqv_out",)
        assert by_output["blk.1.ffn_down"].inputs == ("blk.1.ffn_out",)

    def test_a_separate_head_is_used_when_the_model_has_one(self):
        tied = {op.name: op.weights for op in op_table(CONFIG)}
        separate = {op.name: op.weights for op in op_table(replace(CONFIG, tied_head=False))}
        assert tied["result_output"] == ("token_embd.weight",)
        assert separate["result_output"] == ("output.weight",)

    def test_recorded_float32_inputs_are_computed_in_float64(self):
        op = next(op for op in op_table(CONFIG) if op.name == "ffn_inp")
        values = {name: np.full((1, 2), 0.1, np.float32) for name in op.inputs}
        out = op.apply(values, {})
        assert out.dtype == np.float64
        assert out[0, 0] == 2 * float(np.float32(0.1))

    def test_an_architecture_without_a_graph_is_refused(self):
        with pytest.raises(
            BadInputError, match=r"architecture 'mamba': expected bitnet-b1\.58 or bitnet-25 or bitnet or llama"
        ):
            op_table(replace(CONFIG, architecture="mamba"))


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
        steps = forward(op_table(CONFIG), random_weights(CONFIG), [1, 2, 3], KVState())
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
        for op, _ in forward(op_table(CONFIG), weights, [3], state):
            if op.output == "blk.1.kq":
                break
        assert state.n_tokens == 2
        assert all(np.array_equal(before[name], state.arrays[name]) for name in before)


def plain_model(config, weights, token_ids):
    """The model again, in loops over tokens and heads, with only lists of keys and values as state."""

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
