"""Export of arrays to GGUF, and counting correct answers through the engine. No PyTorch."""

from __future__ import annotations

import hashlib
import json

import click
import numpy as np
import pytest

from bitnet_py import Model
from bitnet_py.quants import quantize_absmean, unpack_i2_s
from tools.train.evaluate import Score, answer, ask, table
from tools.train.export import ExportError, gguf_names, write_gguf
from tools.train.plot import draw
from tools.train.shape import Shape
from tools.train.vocabulary import EOT, train_vocabulary

SHAPE = Shape(n_layers=2, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=300, context_length=64)


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(["what is the capital of france? paris and the moon"] * 3, SHAPE.vocab_size)


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {"token_embd.weight": rng.normal(size=(SHAPE.vocab_size, SHAPE.dim)) / 11}
    for layer in range(SHAPE.n_layers):
        for name, width in SHAPE.norms().items():
            arrays[f"blk.{layer}.{name}.weight"] = rng.uniform(0.5, 1.5, width)
        for name, size in SHAPE.matrices().items():
            arrays[f"blk.{layer}.{name}.weight"] = rng.normal(size=size) / np.sqrt(size[1])
    arrays["output_norm.weight"] = rng.uniform(0.5, 1.5, SHAPE.dim)
    return {name: values.astype(np.float32) for name, values in arrays.items()}


@pytest.fixture(scope="module")
def vocabulary_of_shape(vocabulary):
    """The trainer may find fewer merges than asked for; unused control tokens fill up."""
    missing = SHAPE.vocab_size - len(vocabulary["tokenizer.ggml.tokens"])
    tokens = vocabulary["tokenizer.ggml.tokens"] + [f"<|unused_{i}|>" for i in range(missing)]
    kinds = vocabulary["tokenizer.ggml.token_type"] + [3] * missing
    return {**vocabulary, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vocabulary_of_shape):
    path = tmp_path_factory.mktemp("export") / "model.gguf"
    write_gguf(path, SHAPE, vocabulary_of_shape, random_arrays())
    return path


def test_the_engine_reads_the_shape_and_the_vocabulary(exported, vocabulary_of_shape):
    with Model.from_gguf(exported) as model:
        config = model.config
        assert (config.n_layers, config.dim, config.hidden_dim) == (2, 128, 256)
        assert (config.n_heads, config.n_kv_heads) == (4, 2)
        assert (config.head_dim, config.rope_base, config.vocab_size) == (32, 1000.0, 300)
        assert config.rms_eps == pytest.approx(1e-5)
        assert model.tokenizer.pre == "llama-bpe"
        assert model.tokenizer.bos_id == vocabulary_of_shape["tokenizer.ggml.bos_token_id"]
        eot = vocabulary_of_shape["tokenizer.ggml.tokens"].index(EOT)
        assert model.tokenizer.eos_ids == {vocabulary_of_shape["tokenizer.ggml.eos_token_id"], eot}


def test_every_matrix_of_the_file_is_the_absmean_rounding_of_its_array(exported):
    arrays = random_arrays()
    parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
             "down": "ffn_down"}  # fmt: skip
    with Model.from_gguf(exported) as model:
        for index, layer in enumerate(model.weights.layers):
            for field, name in parts.items():
                matrix = getattr(layer, field)
                ternary, scale = quantize_absmean(arrays[f"blk.{index}.{name}.weight"])
                assert np.array_equal(unpack_i2_s(matrix.data, matrix.rows, matrix.cols), ternary), name
                assert matrix.scale == scale
            for name in SHAPE.norms():
                assert np.array_equal(getattr(layer, name), arrays[f"blk.{index}.{name}.weight"])
        assert np.array_equal(model.weights.token_embd, arrays["token_embd.weight"].astype(np.float16))


def test_the_same_arrays_give_the_same_bytes(exported, tmp_path, vocabulary_of_shape):
    write_gguf(tmp_path / "again.gguf", SHAPE, vocabulary_of_shape, random_arrays())
    assert (tmp_path / "again.gguf").read_bytes() == exported.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("output_norm.weight"), "'output_norm.weight' missing or unexpected"),
        (lambda arrays: arrays.update(extra=np.ones(1, np.float32)), "'extra' missing or unexpected"),
        (lambda arrays: arrays.update({"output_norm.weight": np.ones(3, np.float32)}), r"\(128,\), found \(3,\)"),
        (
            lambda arrays: arrays["blk.1.ffn_up.weight"].__setitem__((0, 0), np.nan),
            "ffn_up.weight: expected finite",
        ),
    ],
)
def test_unusable_arrays_are_refused_and_leave_no_file(tmp_path, vocabulary_of_shape, change, message):
    arrays = random_arrays()
    change(arrays)
    with pytest.raises(ExportError, match=message):
        write_gguf(tmp_path / "bad.gguf", SHAPE, vocabulary_of_shape, arrays)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_another_size_is_refused(tmp_path, vocabulary_of_shape):
    tokens = vocabulary_of_shape["tokenizer.ggml.tokens"][:-1]
    with pytest.raises(ExportError, match="expected a vocabulary of 300 tokens, found 299"):
        write_gguf(
            tmp_path / "bad.gguf", SHAPE, {**vocabulary_of_shape, "tokenizer.ggml.tokens": tokens}, random_arrays()
        )


def test_every_tensor_of_the_file_has_a_parameter(exported):
    with Model.from_gguf(exported):
        assert set(gguf_names(SHAPE)) == set(random_arrays())


def test_scores_count_seen_and_unseen_apart(exported):
    with Model.from_gguf(exported) as model:
        said = {prompt: answer(model, prompt) for prompt in ("what is?", "the moon", "paris")}
        lines = [
            {"family": "a", "seen": True, "prompt": "what is?", "answer": said["what is?"].strip()},
            {"family": "a", "seen": False, "prompt": "the moon", "answer": said["the moon"].strip() + "x"},
            {"family": "b", "seen": False, "prompt": "paris", "answer": said["paris"].strip()},
        ]
        scores, wrong = ask(model, lines)
        assert scores == [Score("a", 1, 1, 0, 1), Score("b", 0, 0, 1, 1), Score("all", 1, 1, 1, 2)]
        assert wrong == [{**lines[1], "found": said["the moon"]}]
        assert "| all | 1/1 (100.0%) | 1/2 (50.0%) | 2/3 (66.7%) |" in table(scores)
        with pytest.raises(click.UsageError, match="found none"):
            ask(model, [])


def test_the_plot_shows_every_point(tmp_path):
    log = [{"step": 50, "loss": 2.0}, {"step": 100, "loss": 1.0}, {"step": 100, "accuracy": {"sum": [1.0, 0.5]}}]
    text = draw(log)
    assert text.startswith("<svg")
    assert text.count("<polyline") == 3
    # Step 100 is the right edge; half the top loss is half-way up.
    assert "672.0,160.0" in text
    with pytest.raises(click.UsageError, match="found none"):
        draw(json.loads('[{"step": 1, "accuracy": {}}]'))


def test_export_is_independent_of_the_order_of_arrays(tmp_path, exported, vocabulary_of_shape):
    arrays = dict(reversed(random_arrays().items()))
    write_gguf(tmp_path / "again.gguf", SHAPE, vocabulary_of_shape, arrays)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (exported, tmp_path / "again.gguf")}
    assert len(digests) == 1
