"""The forward pass: what must not change its bits, what must, and what it rejects."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bitnet_py import Arithmetic, Model, _kernels
from bitnet_py.errors import InputError, ModelError, NativeError
from bitnet_py.gguf import GGUFFile
from bitnet_py.taps import LAYER_TAPS, MODEL_TAPS
from tests.support.families import FAMILIES

PROMPT = [1, 17, 42, 250, 3, 99, 8, 120, 64, 5, 31, 77, 200]


def logits_of(path, prompt=PROMPT, steps=(11, 12), *, logits="last", **options):
    """Logits of a prompt pass and of single-token passes after it, stacked."""
    with Model.from_gguf(path, **{"n_threads": 1, **options}) as model:
        cache = model.new_cache()
        rows = [model.forward(prompt, cache, logits=logits).logits]
        rows += [model.forward([token], cache).logits for token in steps]
        return np.concatenate([row for row in rows if row is not None])


def same_bits(a, b):
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


OF_EMBEDDING_MODELS = {
    *("attn_q_norm_in", "attn_k_norm_in", "attn_v_norm_in", "q_norm", "k_norm", "q_scaled", "attn_post_norm"),
    *("ffn_gate_norm_in", "ffn_up_norm_in", "ffn_post_norm", "inp_scaled", "pooled"),
}
"""Taps that other models have not: see test_embedding."""


def all_taps(model):
    in_layers = [tap for tap in LAYER_TAPS if tap not in OF_EMBEDDING_MODELS]
    names = [f"blk.{i}.{tap}" for i in range(model.config.n_layers) for tap in in_layers]
    return [*names, *(tap for tap in MODEL_TAPS if tap not in OF_EMBEDDING_MODELS)]


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_thread_count_does_not_change_bits(make_model, n_threads):
    path = make_model()
    for _ in range(3):  # a lost slice or a missing barrier need not show every time
        assert same_bits(logits_of(path), logits_of(path, n_threads=n_threads, bytes_per_thread=1))


def test_little_work_uses_fewer_threads_and_the_same_bits(make_model):
    path = make_model()
    with Model.from_gguf(path, n_threads=3, bytes_per_thread=200_000) as model:  # 1 thread, or 2, or 3 as it comes
        cache = model.new_cache()
        rows = [model.forward(ids, cache).logits for ids in (PROMPT, [11], PROMPT[:5], [12], PROMPT)]
    with Model.from_gguf(path, n_threads=1) as model:
        cache = model.new_cache()
        alone = [model.forward(ids, cache).logits for ids in (PROMPT, [11], PROMPT[:5], [12], PROMPT)]
    assert same_bits(np.concatenate(rows), np.concatenate(alone))


@pytest.mark.parametrize("kernel", FAMILIES)
@pytest.mark.parametrize("simd_width", [8, 16])
def test_kernel_does_not_change_bits(make_model, kernel, simd_width):
    path = make_model(dim=384, n_heads=3, n_kv_heads=1, hidden_dim=640)
    arithmetic = Arithmetic(simd_width=simd_width)
    one = logits_of(path, arithmetic=arithmetic, kernel="scalar")
    assert same_bits(one, logits_of(path, arithmetic=arithmetic, kernel=kernel))


def test_simd_width_of_the_reference_changes_bits(make_model):
    path = make_model()
    assert not same_bits(logits_of(path), logits_of(path, arithmetic=Arithmetic(simd_width=16)))


def test_recording_taps_does_not_change_bits(make_model):
    path = make_model()
    with Model.from_gguf(path, n_threads=2, bytes_per_thread=1) as model:
        cache = model.new_cache()
        watched = [model.forward(PROMPT, cache, taps=all_taps(model)).logits]
        watched += [model.forward([token], cache, taps=all_taps(model)).logits for token in (11, 12)]
    assert same_bits(np.concatenate(watched), logits_of(path))


def test_thread_count_does_not_change_what_is_recorded(make_model):
    path = make_model()
    recorded = []
    for n_threads in (1, 3, 3, 3):
        with Model.from_gguf(path, n_threads=n_threads, bytes_per_thread=1) as model:
            recorded.append(model.forward(PROMPT * 5, model.new_cache(), taps=all_taps(model)).taps)
    for other in recorded[1:]:
        assert [name for name in other if not same_bits(other[name], recorded[0][name])] == []


def test_every_tap_of_every_pass_is_recorded_with_its_shape(tiny_model):
    cache, config = tiny_model.new_cache(), tiny_model.config
    for tokens, start in ((PROMPT, 0), ([7], len(PROMPT))):
        n, recorded = len(tokens), tiny_model.forward(tokens, cache, taps=all_taps(tiny_model)).taps
        assert set(recorded) == set(all_taps(tiny_model))
        assert recorded["blk.0.q"].shape == (n, config.n_heads, config.head_dim)
        assert recorded["blk.1.v"].shape == (n, config.n_kv_heads, config.head_dim)
        assert recorded["blk.1.kq"].shape == (config.n_heads, n, start + n)
        assert recorded["blk.0.ffn_act"].shape == (n, config.hidden_dim)
        assert recorded["blk.0.l_out"].shape == (n, config.dim)
        assert recorded["blk.1.l_out"].shape == (1, config.dim)
        assert recorded["result_output"].shape == (1, config.vocab_size)
        assert all(np.isfinite(array).all() for array in recorded.values())


def test_taps_satisfy_the_definitions_that_are_exact(tiny_model):
    t = tiny_model.forward(PROMPT, tiny_model.new_cache(), taps=all_taps(tiny_model)).taps
    weights = tiny_model.weights
    assert same_bits(t["inp_embd"], weights.token_embd[PROMPT].astype(np.float32))
    relu = np.maximum(t["blk.0.ffn_gate"], 0)
    assert same_bits(t["blk.0.ffn_act"], relu * relu)
    assert same_bits(t["blk.0.ffn_out"], t["blk.0.ffn_act"] * t["blk.0.ffn_up"])
    assert same_bits(t["blk.0.ffn_inp"], t["blk.0.attn_o_out"] + t["inp_embd"])
    assert same_bits(t["blk.0.l_out"], t["blk.0.ffn_down"] + t["blk.0.ffn_inp"])
    assert same_bits(t["blk.1.ffn_inp"], (t["blk.1.attn_o_out"] + t["blk.0.l_out"])[-1:])
    future = np.triu(np.ones((len(PROMPT), len(PROMPT)), bool), 1)
    assert (t["blk.0.kq_soft_max"][:, future] == 0).all()


def test_long_prompt_runs_in_passes_of_n_ubatch(make_model):
    path = make_model()
    with Model.from_gguf(path, n_threads=1) as model:
        cache = model.new_cache()
        for first in range(0, len(PROMPT), 5):
            expected = model.forward(PROMPT[first : first + 5], cache).logits
    assert same_bits(logits_of(path, steps=(), n_ubatch=5), expected)
    with pytest.raises(InputError, match="n_ubatch"):
        Model.from_gguf(path, n_ubatch=0)


def test_last_pass_of_one_token_takes_the_single_token_path(make_model):
    path = make_model()
    assert same_bits(
        logits_of(path, PROMPT, (), n_ubatch=len(PROMPT) - 1), logits_of(path, PROMPT[:-1], PROMPT[-1:])[1:]
    )


def test_prompt_and_single_tokens_agree_up_to_quantisation_noise(make_model):
    path = make_model()
    together, one_by_one = logits_of(path, PROMPT, ()), logits_of(path, PROMPT[:1], PROMPT[1:])[-1:]
    cosine = (together * one_by_one).sum() / np.linalg.norm(together) / np.linalg.norm(one_by_one)
    assert cosine > 0.99


def test_logits_of_all_tokens(make_model):
    path = make_model()
    every = logits_of(path, steps=(), logits="all")
    assert every.shape == (len(PROMPT), 300)
    # several rows are multiplied in float32, a single one in binary16: close, not equal
    np.testing.assert_allclose(every[-1:], logits_of(path, steps=()), rtol=0, atol=0.02 * np.abs(every).max())
    with Model.from_gguf(path, n_threads=1) as model:
        result = model.forward(PROMPT, model.new_cache(), logits="none", taps=["blk.1.attn_o_out", "blk.1.l_out"])
        assert result.logits is None
        assert set(result.taps) == {"blk.1.attn_o_out"}  # nothing after it is needed


def test_cache_grows_and_keeps_what_it_holds(make_model):
    path = make_model()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, 600).tolist()
    with Model.from_gguf(path, n_threads=1) as model:
        grown, roomy = model.new_cache(), model.new_cache()
        roomy.reserve(1000)
        for first in range(0, 600, 120):
            a = model.forward(tokens[first : first + 120], grown).logits
            b = model.forward(tokens[first : first + 120], roomy).logits
        assert grown.n_tokens == 600
        assert grown.capacity < roomy.capacity
        assert same_bits(a, b)


def test_reset_cache_gives_the_first_result_again(tiny_model):
    cache = tiny_model.new_cache()
    first = tiny_model.forward(PROMPT, cache).logits
    tiny_model.forward([5], cache)
    cache.reset()
    assert same_bits(first, tiny_model.forward(PROMPT, cache).logits)


def test_separate_head_is_used(make_model):
    tied, untied = make_model(), make_model(untied_head=True)
    with Model.from_gguf(untied, n_threads=1) as model:
        assert model.weights.output is not None
        taps = model.forward(PROMPT, model.new_cache(), taps=["result_norm", "result_output"]).taps
        normed = taps["result_norm"].astype(np.float16).astype(np.float64)
        expected = normed @ model.weights.output.astype(np.float64).T
        np.testing.assert_allclose(taps["result_output"], expected, rtol=1e-4, atol=1e-4)
    assert not same_bits(logits_of(tied), logits_of(untied))


def test_model_without_sub_norms_lacks_those_taps(make_model):
    with Model.from_gguf(make_model(sub_norms=False), n_threads=1) as model:
        recorded = model.forward(PROMPT, model.new_cache(), taps=all_taps(model)).taps
        assert set(all_taps(model)) - set(recorded) == {
            f"blk.{i}.{n}_sub_norm" for i in (0, 1) for n in ("attn", "ffn")
        }


def test_counters_tell_what_ran(tiny_model):
    cache = tiny_model.new_cache()
    assert all(c.calls == 0 for c in tiny_model.counters())
    tiny_model.forward(PROMPT, cache)
    tiny_model.forward([5], cache)
    counts = {c.operation: c for c in tiny_model.counters()}
    weights_bytes = sum(m.data.size for m in tiny_model.weights.matrices())
    # the last layer's FFN runs on the one output row, so its three matrices are multiplied with a vector
    assert counts["i2s_gemm"].calls == 7 * 2 - 3
    assert counts["i2s_gemv"].calls == 7 * 2 + 3
    assert counts["i2s_gemm"].bytes + counts["i2s_gemv"].bytes == 2 * weights_bytes
    assert {c.operation for c in counts.values() if c.quantized} == {"i2s_gemm", "i2s_gemv"}
    assert {c.operation for c in counts.values() if c.bytes and not c.reads_weights} == {"attention"}
    for c in counts.values():
        assert c.name == f"{c.operation}_{c.family}"
        assert c.family == ("scalar" if c.operation == "rms_norm" else tiny_model.kernel_name)


class TestLlama:
    """SiLU, RoPE of adjacent pairs, heads wider than dim / n_heads, no sub-norms, a separate LM head."""

    ROUNDOFF = 2.0**-24

    @pytest.fixture
    def path(self, make_model):
        return make_model(arch="llama", n_heads=4, n_kv_heads=2, head_dim=96, untied_head=True)

    @pytest.fixture
    def model(self, path):
        with Model.from_gguf(path, n_threads=1) as model:
            yield model

    def test_every_operation_follows_from_its_recorded_inputs(self, model):
        layer, last, n = model.weights.layers[0], model.weights.layers[1], len(PROMPT)
        t = model.forward(PROMPT, model.new_cache(), taps=all_taps(model), logits="all").taps
        assert "blk.0.attn_sub_norm" not in t
        assert t["blk.0.q"].shape == t["blk.0.q_rope"].shape == (n, 4, 96)
        assert t["blk.0.kqv_out"].shape == (n, 4 * 96)
        for tap, matrix, name in (
            ("attn_norm", layer.q, "q"),
            ("attn_norm", layer.k, "k"),
            ("kqv_out", layer.o, "attn_o_out"),
            ("ffn_norm", layer.up, "ffn_up"),
            ("ffn_out", layer.down, "ffn_down"),
        ):
            assert same_bits(t[f"blk.0.{name}"].reshape(n, -1), bitlinear(t[f"blk.0.{tap}"], matrix))
        assert same_bits(t["blk.1.ffn_gate"], bitlinear(t["blk.1.ffn_norm"], last.gate))

        x = t["blk.0.q"].astype(np.float64)
        angle = np.arange(n)[:, None, None] * 500000.0 ** (-np.arange(48) / 48)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
        np.testing.assert_allclose(t["blk.0.q_rope"], expected, rtol=0, atol=1e-5 * np.abs(x).max())

        values = np.repeat(t["blk.0.v"], 2, axis=1).astype(np.float64)
        mixed = np.einsum("htk,khd->thd", t["blk.0.kq_soft_max"], values).reshape(n, -1)
        np.testing.assert_allclose(t["blk.0.kqv_out"], mixed, rtol=0, atol=2e-3 * np.abs(values).max())

        gate = t["blk.0.ffn_gate"].astype(np.float64)
        silu = gate / (1 + np.exp(-gate))
        assert (np.abs(t["blk.0.ffn_act"] - silu) <= 7 * self.ROUNDOFF * np.abs(silu)).all()
        assert same_bits(t["blk.0.ffn_out"], t["blk.0.ffn_act"] * t["blk.0.ffn_up"])

        logits = t["result_norm"].astype(np.float64) @ model.weights.output.astype(np.float64).T
        np.testing.assert_allclose(t["result_output"], logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kernel", FAMILIES)
    def test_kernels_and_threads_do_not_change_bits(self, path, kernel):
        expected = logits_of(path, kernel="scalar", logits="all")
        for n_threads in (1, 3):
            options = {"kernel": kernel, "n_threads": n_threads, "bytes_per_thread": 1}
            assert same_bits(logits_of(path, logits="all", **options), expected)


def bitlinear(x, matrix):
    """The product of each row of ``x`` with a ternary matrix, by the scalar kernels."""
    packed = matrix.data.reshape(matrix.rows, -1)
    rows = []
    for row in x:
        q, scale, total = _kernels.quantize(row, kernel="scalar")
        acc = _kernels.i2s_dot(packed, q[None], kernel="scalar")[0]
        rows.append(_kernels.rescale(acc, total, float(scale), matrix.scale, kernel="scalar"))
    return np.stack(rows)


def test_refuses_empty_long_and_foreign_input(tiny_model):
    cache = tiny_model.new_cache()
    with pytest.raises(InputError, match="prompt is empty"):
        tiny_model.forward([], cache)
    with pytest.raises(InputError, match="do not fit the model's context"):
        tiny_model.forward([1] * (tiny_model.config.context_length + 1), cache)
    for bad in (-1, 300):
        with pytest.raises(InputError, match=f"token id {bad} is outside"):
            tiny_model.forward([1, bad], cache)
    assert cache.n_tokens == 0


def test_forced_kernel_is_used_or_refused(make_model, monkeypatch):
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    with Model.from_gguf(make_model()) as model:
        assert model.kernel_name == "scalar"
        model.forward([1], model.new_cache())
        assert {c.name for c in model.counters() if c.calls} >= {"i2s_gemv_scalar", "head_f16_scalar"}
    monkeypatch.setenv("BITNET_KERNEL", "sse9")
    with pytest.raises(NativeError, match="unknown kernel 'sse9'"):
        Model.from_gguf(make_model())


def test_closed_model_says_so(make_model):
    model = Model.from_gguf(make_model())
    model.close()
    model.close()
    with pytest.raises(InputError, match="closed"):
        model.forward([1], model.new_cache())


class TestLargest:
    """The largest logits with the compact copy of the head are those of the whole head."""

    @pytest.mark.parametrize("kernel", FAMILIES)
    @pytest.mark.parametrize("simd_width", [8, 16])
    @pytest.mark.parametrize("n_threads", [1, 2, 3])
    def test_same_tokens_and_bits(self, make_model, kernel, simd_width, n_threads):
        options = {
            "kernel": kernel,
            "arithmetic": Arithmetic(simd_width=simd_width),
            "n_threads": n_threads,
            "bytes_per_thread": 1,
        }
        with Model.from_gguf(make_model(), screen_from_bytes=0, **options) as model:
            vocab = model.config.vocab_size
            whole, searched = model.new_cache(), model.new_cache()
            model.screen()
            for ids, n in ((PROMPT, 1), ([11], 1), ([12], 7), (PROMPT[:5], 256), ([13], vocab), ([14], 0)):
                row = model.forward(ids, whole).logits[-1]
                found = model.largest(ids, searched, n)
                expected = np.argsort(-row, kind="stable")[: n or vocab]
                np.testing.assert_array_equal(found.ids, expected)
                assert same_bits(found.logits, row[expected])
                assert same_bits(found.all_logits(), row)
            assert searched.n_tokens == whole.n_tokens
            used = {count.operation: count.calls for count in model.counters()}
            assert used["head_screen"] == 4  # of more than 256 logits there is no search

    def test_the_first_token_waits_for_no_copy(self, make_model):
        with Model.from_gguf(make_model(), n_threads=1, screen_from_bytes=0) as model:
            vocab, cache = model.config.vocab_size, model.new_cache()
            assert model.largest(PROMPT, cache, 1).n_rows_read == vocab
            assert model.largest([11], cache, 1).n_rows_read < vocab
        with Model.from_gguf(make_model(), n_threads=1) as model:  # a head this small is read whole
            cache = model.new_cache()
            assert not model.searches_head
            assert [model.largest([11], cache, 1).n_rows_read for _ in range(3)] == [vocab] * 3

    def test_a_prompt_in_several_passes(self, make_model):
        path = make_model()
        with Model.from_gguf(path, n_threads=1, n_ubatch=4, screen_from_bytes=0) as model:
            row = model.forward(PROMPT, model.new_cache()).logits[-1]
            model.screen()
            found = model.largest(PROMPT, model.new_cache(), 3)
        np.testing.assert_array_equal(found.ids, np.argsort(-row, kind="stable")[:3])

    def test_all_logits_only_until_the_next_pass(self, make_model):
        with Model.from_gguf(make_model(), n_threads=1, screen_from_bytes=0) as model:
            cache = model.new_cache()
            model.screen()
            found = model.largest(PROMPT, cache, 1)
            model.forward([11], cache)
            with pytest.raises(RuntimeError, match="has run another pass"):
                found.all_logits()

    def test_a_negative_number_is_refused(self, tiny_model):
        with pytest.raises(InputError, match="-1 logits requested"):
            tiny_model.largest(PROMPT, tiny_model.new_cache(), -1)

    @pytest.mark.parametrize("searched", [False, True])
    def test_a_head_that_is_not_finite_is_an_error(self, make_model, tmp_path, searched):
        path = Path(shutil.copy(make_model(untied_head=True), tmp_path))
        with GGUFFile.open(path) as gguf:
            offset = gguf.tensors["output.weight"].offset
        data = bytearray(path.read_bytes())
        row, dim = 33, 128
        at = offset + 2 * (row * dim + 5)
        data[at : at + 2] = np.float16(np.nan).tobytes()
        path.write_bytes(data)
        with Model.from_gguf(path, n_threads=1, screen_from_bytes=0) as model:
            if searched:
                model.screen()
            with pytest.raises(ModelError, match="first: token 33 is nan"):
                model.largest(PROMPT, model.new_cache(), 1)
