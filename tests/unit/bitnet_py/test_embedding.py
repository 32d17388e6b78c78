"""Embedding models: every tensor against the NumPy statement of main's arithmetic, and the vector of a text."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py import Arithmetic, Model, cli, embed
from bitnet_py.embedding import normalized, pooling_for
from bitnet_py.errors import InputError, ModelError, NativeError
from bitnet_py.taps import LAYER_TAPS, MODEL_TAPS
from tests.support.families import FAMILIES
from tests.support.numpy_bitnet.model import Model as NumpyModel
from tests.support.numpy_main.engine import NumpyMain, pooled

AVX2 = Arithmetic("main")
BUILDS = {"avx2": AVX2, "avx512": replace(AVX2, simd_width=16)}
BUILDS |= {f"{name} flash": replace(build, flash_attention=True) for name, build in BUILDS.items()}
each_build = pytest.mark.parametrize("arithmetic", BUILDS.values(), ids=BUILDS)
QWEN = {"arch": "qwen3", "dim": 128, "n_heads": 3, "n_kv_heads": 1, "head_dim": 128, "norms": "f16"}
GEMMA = {
    "arch": "gemma3",
    "dim": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 96,
    "norms": "f16",
    "vocab_size": 450,
}
"""1 / sqrt(96) is no power of two: scaling Q is not scaling the scores."""
SHAPES = {
    "qwen3": QWEN,
    "gemma3": GEMMA,
    "qwen3 without norms of inputs": QWEN | {"sub_norms": False},
    "gemma3 without norms of inputs": GEMMA | {"sub_norms": False},
    "norms in F32": QWEN | {"norms": "f32"},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tokens(n: int) -> list[int]:
    return [(37 * i * i + 11 * i + 5) % 300 for i in range(n)]


def every_tap(model):
    return [*(f"blk.{i}.{tap}" for i in range(model.config.n_layers) for tap in LAYER_TAPS), *MODEL_TAPS]


def compare(path, arithmetic, n, *, logits="all", pooling="mean", then=(), **options):
    stated = NumpyMain(NumpyModel(path), arithmetic)
    with Model.from_gguf(
        path, arithmetic=arithmetic, **{"n_threads": 2, "bytes_per_thread": 1, **options}
    ) as model:
        cache, names = model.new_cache(), every_tap(model)
        expected = stated.forward(tokens(n), all_logits=True, pooling=pooling)
        found = model.forward(tokens(n), cache, taps=names, logits=logits, pooling=pooling)
        assert found.pooled.tobytes() == expected["pooled"].tobytes()
        if logits == "none":
            assert found.logits is None
            del expected["result_output"]
        else:
            assert found.logits.tobytes() == expected["result_output"].tobytes()
        equal(found.taps, expected)
        for ids in then:
            equal(model.forward(ids, cache, taps=names).taps, stated.forward(ids))


def equal(found, expected):
    assert set(found) == set(expected)
    wrong = [name for name, array in expected.items() if array.tobytes() != found[name].tobytes()]
    assert not wrong
    assert all(found[name].shape == array.shape for name, array in expected.items())


class TestEveryTensor:
    @each_build
    @each_shape
    def test_a_prompt_and_a_token(self, make_model, shape, arithmetic):
        compare(make_model(**shape), arithmetic, 5, then=[[7]])

    @each_build
    @pytest.mark.parametrize("n", [1, 2])
    def test_lengths(self, make_model, arithmetic, n):
        compare(make_model(n_layers=1, **QWEN), arithmetic, n)
        compare(make_model(n_layers=1, **GEMMA), arithmetic, n)

    def test_flash_attention_in_tiles(self, make_model):
        compare(make_model(n_layers=1, **GEMMA), BUILDS["avx512 flash"], 65)

    @pytest.mark.parametrize("kernel", FAMILIES)
    @pytest.mark.parametrize("shape", [QWEN, GEMMA], ids=["qwen3", "gemma3"])
    def test_every_family(self, make_model, shape, kernel):
        compare(make_model(**shape), BUILDS["avx512"], 6, kernel=kernel)

    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_without_the_head(self, make_model, pooling):
        compare(make_model(**QWEN), AVX2, 4, logits="none", pooling=pooling)

    def test_a_head_of_its_own(self, make_model):
        path = make_model(**QWEN, untied_head=True)
        with Model.from_gguf(path, n_threads=1) as model:
            result = model.forward(tokens(1), model.new_cache(), taps=["result_norm"])
            head = model.weights.output
            assert head is not None
            row = result.taps["result_norm"][0].astype(np.float16).astype(np.float64)
            assert np.allclose(result.logits[0], head.astype(np.float64) @ row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65, 130])
def test_the_mean_in_the_order_of_a_build(make_model, n, width):
    """Whole steps of four accumulators, then token by token: 32 tokens a step with 8 lanes, 64 with 16."""
    arithmetic = Arithmetic("main", simd_width=width)
    with Model.from_gguf(make_model(n_layers=1, **QWEN), arithmetic=arithmetic, n_threads=2) as model:
        found = model.forward(
            tokens(n), model.new_cache(), taps=["result_norm", "pooled"], logits="none", pooling="mean"
        )
    rows = found.taps["result_norm"]
    assert rows.shape == (n, 128)
    assert found.taps["pooled"].tobytes() == found.pooled.tobytes() == pooled(rows, "mean", width).tobytes()
    assert np.allclose(found.pooled, rows.astype(np.float64).mean(0), atol=1e-6)


class TestVector:
    @pytest.fixture
    def model(self, make_model):
        with Model.from_gguf(make_model(**QWEN, pooling="mean"), n_threads=1) as model:
            yield model

    def test_pooling_is_the_files_unless_given(self, model):
        assert pooling_for(model.config) == "mean"
        of = {name: embed(model, tokens(5), pooling=name) for name in (None, "mean", "last", "cls")}
        assert of[None].tobytes() == of["mean"].tobytes()
        assert len({vector.tobytes() for vector in of.values()}) == 3
        assert embed(model, tokens(5)[:1], pooling="last").tobytes() == of["cls"].tobytes()

    def test_length_is_one(self, model):
        vector, raw = embed(model, tokens(9)), embed(model, tokens(9), normalize=False)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=1e-6)
        assert vector.tobytes() == normalized(raw).tobytes() != raw.tobytes()

    def test_more_tokens_than_a_pass_are_one_pass(self, make_model):
        path = make_model(**QWEN, pooling="mean")
        with Model.from_gguf(path, n_threads=1, n_ubatch=4) as few, Model.from_gguf(path, n_threads=1) as many:
            assert embed(few, tokens(9)).tobytes() == embed(many, tokens(9)).tobytes()
            found = few.forward(tokens(9), few.new_cache(), taps=["blk.1.l_out"], logits="none", pooling="last")
            assert found.taps["blk.1.l_out"].shape == (9, 128)

    def test_no_pooling(self, make_model):
        with Model.from_gguf(make_model(**QWEN), n_threads=1) as model:
            with pytest.raises(InputError, match=r"the file gives no pooling.*mean, last or cls"):
                embed(model, tokens(3))
            with pytest.raises(InputError, match="the option gives no pooling"):
                embed(model, tokens(3), pooling="none")

    def test_the_head_is_not_read(self, model):
        embed(model, tokens(3))
        assert {count.operation: count.calls for count in model.counters()}["head_f16"] == 0
        model.forward(tokens(3), model.new_cache(), logits="all", pooling="mean")
        assert {count.operation: count.calls for count in model.counters()}["head_f16"] == 1

    def test_what_goes_with_a_pooling(self, model, make_model):
        with pytest.raises(InputError, match="logits of all tokens, or of none"):
            model.forward(tokens(3), model.new_cache(), pooling="mean")
        with Model.from_gguf(make_model(), n_threads=1) as march, pytest.raises(InputError, match="cpp's main"):
            march.forward(tokens(3), march.new_cache(), logits="none", pooling="mean")

    def test_a_vector_that_is_not_finite(self, make_model, monkeypatch):
        with Model.from_gguf(make_model(**QWEN), n_threads=1) as model:
            monkeypatch.setattr("bitnet_py.embedding.normalized", lambda vector: vector * np.float32("inf"))
            with pytest.raises(ModelError, match=r"not finite.*inspect --verify"):
                embed(model, tokens(3), pooling="mean")


def test_squares_in_binary32_their_sum_in_order_in_binary64():
    vector = np.random.default_rng(3).standard_normal(1024).astype(np.float32)
    total = 0.0
    for value in vector:
        total += float(np.float32(value * value))
    assert normalized(vector).tobytes() == (vector * np.float32(1 / np.sqrt(total))).tobytes()
    assert (normalized(np.zeros(4, np.float32)) == 0).all()


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_march_has_no_such_architecture(make_model, arch):
    shape = QWEN if arch == "qwen3" else GEMMA
    with pytest.raises(
        InputError, match=f"March has no architecture {arch}: give an arithmetic of generation main"
    ):
        Model.from_gguf(make_model(**shape), arithmetic=Arithmetic())
    with Model.from_gguf(make_model(**shape), n_threads=1) as model:
        assert model.arithmetic == Arithmetic("main")


def test_main_does_not_compute_them_with_silu(make_model):
    """It has no squared ReLU, but it has GELU."""
    followed = Arithmetic("main", follow_reference=True)
    with Model.from_gguf(make_model(**GEMMA), arithmetic=followed, n_threads=1) as model:
        found = model.forward(tokens(3), model.new_cache(), taps=["blk.0.ffn_act"], logits="none")
    with Model.from_gguf(make_model(**GEMMA), n_threads=1) as model:
        expected = model.forward(tokens(3), model.new_cache(), taps=["blk.0.ffn_act"], logits="none")
    assert found.taps["blk.0.ffn_act"].tobytes() == expected.taps["blk.0.ffn_act"].tobytes()


@pytest.mark.parametrize("lacking", ["attn_v_norm_in", "k_norm", "ffn_post_norm"])
def test_the_library_wants_norms_that_come_together(make_model, monkeypatch, lacking):
    from bitnet_py import model as module

    def without(weights):
        struct = module_struct(weights)
        setattr(struct.layers[0], lacking, None)
        return struct

    module_struct = module.model_struct
    monkeypatch.setattr(module, "model_struct", without)
    with pytest.raises(NativeError, match="norms of the layers do not agree"):
        Model.from_gguf(make_model(**GEMMA), n_threads=1)


class TestCommand:
    @staticmethod
    def bitnet(*args):
        return CliRunner().invoke(cli.main, ["embed", *map(str, args)])

    @pytest.mark.parametrize(("shape", "ends"), [(QWEN, [None, "eos"]), (GEMMA, ["bos", "eos"])])
    def test_text_is_tokenised_as_the_file_says(self, make_model, shape, ends):
        path = make_model(**{**shape, "vocab_size": 450}, pooling="last")
        report = json.loads(self.bitnet("--model", path, "--text", "the old river", "--json").stdout)
        with Model.from_gguf(path, n_threads=1) as model:
            vocabulary = model.tokenizer.vocabulary
            ids = model.tokenizer.encode("the old river", add_bos=False)
            first = [] if ends[0] is None else [vocabulary.bos_id]
            assert report["token_ids"] == [*first, *ids, vocabulary.eos_id]
            vector = embed(model, report["token_ids"])
        assert (report["pooling"], report["normalized"]) == ("last", True)
        assert np.array(report["embedding"], np.float32).tobytes() == vector.tobytes()

    def test_ids_and_plain_numbers(self, make_model):
        path = make_model(**QWEN)
        args = ("--model", path, "--tokens", "5,16,49", "--pooling", "mean")
        with Model.from_gguf(path, n_threads=1) as model:
            plain, raw = (
                embed(model, [5, 16, 49], pooling="mean"),
                embed(model, [5, 16, 49], pooling="mean", normalize=False),
            )
        assert np.array(self.bitnet(*args).stdout.split(), np.float32).tobytes() == plain.tobytes()
        assert np.array(self.bitnet(*args, "--no-normalize").stdout.split(), np.float32).tobytes() == raw.tobytes()
        flash = np.array(self.bitnet(*args, "--flash-attention").stdout.split(), np.float32)
        assert flash.tobytes() != plain.tobytes()
        assert np.allclose(flash, plain, atol=0.05)

    @pytest.mark.parametrize(
        ("args", "code", "message"),
        [
            ((), 2, "either --text or --tokens"),
            (("--text", "a", "--tokens", "1"), 2, "either --text or --tokens"),
            (("--tokens", "1,,2"), 2, "ids with commas"),
            (("--tokens", "1", "--pooling", "max"), 2, "'max' is not one of"),
            (("--tokens", "1"), 4, "the file gives no pooling"),
            (("--tokens", "300", "--pooling", "mean"), 4, "token 300 is not in the vocabulary"),
            (("--tokens", "99999999999", "--pooling", "mean"), 2, "expected token ids"),
            (("--tokens", "2147483648", "--pooling", "mean"), 2, "expected token ids"),
            (("--tokens", "2147483647", "--pooling", "mean"), 4, "token 2147483647 is not in the vocabulary"),
        ],
    )
    def test_errors_are_one_line(self, make_model, args, code, message):
        done = self.bitnet("--model", make_model(**QWEN), *args)
        assert done.exit_code == code
        assert message in done.stderr
        assert "Traceback" not in done.output
