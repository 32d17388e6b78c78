from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py.config import ARCHITECTURES
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.quants import unpack_i2_s
from bitnet_py.synth import PRESETS, SynthConfig, main, write_model
from bitnet_py.synth_random import Stream
from bitnet_py.synth_vocab import BOS, EOS, EOT, MIN_VOCAB_SIZE, build_vocab, sentences
from bitnet_py.vocabulary import byte_alphabet
from bitnet_py.weights import Weights

MakeModel = Callable[..., Path]
SMALL = SynthConfig(n_layers=1, dim=128, n_heads=2, n_kv_heads=1, hidden_dim=256, vocab_size=MIN_VOCAB_SIZE)


def load(path: Path) -> Weights:
    with GGUFFile.open(path) as gguf:
        return Weights.load(gguf)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_preset_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    result = CliRunner().invoke(main, [str(made), "--preset", "small"])
    assert result.exit_code == 0, result.output
    assert sha256(made) == "63c9ed3ad48673f9b3d6fb91bf342ddedfb53ede30d308ec592500a720192e9c"


def test_random_stream_is_the_same_everywhere() -> None:
    stream = Stream(0, "a name")
    assert stream.bytes(11).tolist() == BYTES_OF_STREAM
    assert [stream.below(1000) for _ in range(4)] == NUMBERS_OF_STREAM
    assert Stream(1, "a name").bytes(11).tolist() != BYTES_OF_STREAM
    assert Stream(0, "another name").bytes(11).tolist() != BYTES_OF_STREAM


BYTES_OF_STREAM = [93, 241, 205, 205, 156, 209, 181, 16, 158, 196, 149]
NUMBERS_OF_STREAM = [892, 444, 145, 410]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shape_and_settings_reach_the_file(make_model: MakeModel, arch: str) -> None:
    shape = {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 384, "vocab_size": 512}
    path = make_model(**shape, arch=arch, context_length=77, rope_base=10000.0, rms_eps=1e-6)
    config = dataclasses.asdict(load(path).config)
    expected = {**shape, "arch": arch, "head_dim": 64, "context_length": 77, "rope_base": 10000.0}
    assert config == {**expected, "rms_eps": float(np.float32(1e-6)), "rope_scale": 1.0, "pooling": "none"}


def test_same_configuration_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        write_model(path, dataclasses.replace(SMALL, seed=seed))
    assert sha256(paths[0]) == sha256(paths[1])
    first, other = load(paths[0]), load(paths[2])
    assert not np.array_equal(first.token_embd, other.token_embd)
    assert not np.array_equal(first.layers[0].q.data, other.layers[0].q.data)
    assert first.layers[0].q.scale != other.layers[0].q.scale


def test_every_norm_and_scale_is_its_own(make_model: MakeModel) -> None:
    """So that swapped, shared or missing ones change the result."""
    weights = load(make_model(n_layers=3))
    scales = [matrix.scale for matrix in weights.matrices()]
    assert len(set(scales)) == len(scales) == 21
    norms = [norm for layer in weights.layers for norm in (layer.attn_norm, layer.attn_sub_norm, layer.ffn_norm)]
    norms.append(weights.output_norm)
    assert len({norm.tobytes() for norm in norms if norm is not None}) == 10
    for norm in norms:
        assert norm is not None
        assert 0.5 <= norm.min() < 0.6 < 1.4 < norm.max() <= 1.5


def test_ternary_weights_are_30_40_30_and_scaled_to_unit_outputs(make_model: MakeModel) -> None:
    weights = load(make_model(dim=256, n_heads=4))
    rng = np.random.default_rng(0)
    for matrix in weights.matrices():
        ternary = unpack_i2_s(matrix.data, matrix.rows, matrix.cols)
        shares = [float((ternary == code).mean()) for code in (-1, 0, 1)]
        np.testing.assert_allclose(shares, [77 / 256, 102 / 256, 77 / 256], atol=0.02)
        output = ternary @ rng.standard_normal(matrix.cols) * matrix.scale
        assert 0.5 < float(np.sqrt(np.mean(output**2))) < 2.0


def test_logits_have_a_spread_of_a_few(make_model: MakeModel) -> None:
    weights = load(make_model(dim=256, n_heads=4, vocab_size=1000))
    hidden = np.random.default_rng(0).standard_normal(256)
    logits = weights.token_embd.astype(np.float64) @ hidden
    assert 2.0 < float(logits.std()) < 4.0


def test_separate_head_and_no_sub_norms(make_model: MakeModel) -> None:
    untied = load(make_model(untied_head=True))
    assert untied.output is not None
    assert not np.array_equal(untied.output, untied.token_embd)
    plain = load(make_model(sub_norms=False))
    assert plain.layers[0].attn_sub_norm is None
    assert plain.layers[0].ffn_sub_norm is None


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", "llama-bpe"), ("default", "default"), ("none", None)])
def test_pre_tokenizer_key(make_model: MakeModel, pre: str, expected: str | None) -> None:
    with GGUFFile.open(make_model(pre=pre)) as gguf:
        assert gguf.metadata.get("tokenizer.ggml.pre") == expected


def test_tokenizer_metadata(make_model: MakeModel) -> None:
    with GGUFFile.open(make_model(vocab_size=400)) as gguf:
        metadata = gguf.metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == len(metadata["tokenizer.ggml.token_type"]) == 400
        assert metadata["tokenizer.ggml.model"] == "gpt2"
        assert metadata["tokenizer.ggml.add_bos_token"] is True
        assert tokens[metadata["tokenizer.ggml.bos_token_id"]] == BOS
        assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == EOS
        control = {
            token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3
        }
        assert {BOS, EOS, EOT, "<|start_header_id|>", "<|end_header_id|>"} < control


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, 1024, 9000])
def test_merges_make_exactly_the_tokens(vocab_size: int) -> None:
    vocab = build_vocab(vocab_size, 0)
    assert len(vocab.tokens) == len(set(vocab.tokens)) == vocab_size
    known = set(byte_alphabet().values())
    assert set(vocab.tokens[:256]) == known
    for index, merge in enumerate(vocab.merges):
        left, right = merge.split(" ")
        assert left in known
        assert right in known
        known.add(left + right)
        assert vocab.tokens[256 + index] == left + right
    assert all(token.startswith("<|") for token in vocab.tokens[256 + len(vocab.merges) :])


def test_byte_alphabet_is_that_of_gpt2() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet[ord("A")], alphabet[ord(" ")], alphabet[ord("\n")], alphabet[0xAD]) == ("A", "Ġ", "Ċ", "Ń")


def test_trained_vocabulary_compresses_its_own_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = build_vocab(1024, 0)
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocab.merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = "".join(sentences(3, 20))
    encoded = tokenizer.encode(text).ids
    assert len(encoded) < len(text) / 3
    assert tokenizer.decode(encoded) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers of at least 1, found 0"),
        ({"dim": 192}, "dim to be a multiple of 128"),
        ({"hidden_dim": 100}, "hidden_dim to be a multiple of 128"),
        ({"n_heads": 3}, "dim to be a multiple of 6"),
        ({"n_heads": 0}, "n_heads of at least 1"),
        ({"n_kv_heads": 3}, "n_heads to be a multiple of 3"),
        ({"vocab_size": 266}, "vocab_size from 267"),
        ({"vocab_size": 1 << 30}, "vocab_size from 267"),
        ({"projections": "tq2_0"}, "dim to be a multiple of 256, found 128"),
        ({"projections": "tq1_0", "dim": 256, "hidden_dim": 384}, "hidden_dim to be a multiple of 256, found 384"),
        ({"projections": "q8_0"}, "projections i2_s or tq1_0 or tq2_0 or f16 or f32, found 'q8_0'"),
        ({"arch": "mamba"}, "arch bitnet-b1.58 or bitnet-25 or bitnet or llama"),
        ({"biases": True}, "no biases in bitnet-b1.58"),
        ({"arch": "bitnet", "rope_freqs": True}, "no rope_freqs in bitnet"),
        ({"rope_scaling": 0.0}, "rope_scaling above 0"),
        ({"rms_eps": 0.0}, "rms_eps above 0"),
        ({"rope_base": float("nan")}, "rope_base above 0"),
    ],
)
def test_shapes_no_engine_could_run(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        write_model(tmp_path / "m.gguf", dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written"):
        write_model(tmp_path / "absent" / "m.gguf", SMALL)


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    options = (
        "--preset odd --layers 1 --dim 128 --heads 2 --hidden 256 --vocab 300 --context 99 --seed 7 --eps 1e-6"
    )
    result = CliRunner().invoke(main, [str(out), *options.split(), "--untied-head", "--arch", "bitnet-25"])
    assert result.exit_code == 0, result.output
    written = tmp_path / "same.gguf"
    config = SynthConfig(1, 128, 2, 1, 256, 300, 99, 500000.0, 1e-6, 7, "bitnet-25", untied_head=True)
    write_model(written, config)
    assert out.read_bytes() == written.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.gguf", "same.gguf"]


def test_command_line_errors_are_usage_errors(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "m.gguf"), "--dim", "200"])
    assert result.exit_code == 2
    assert "dim to be a multiple of 128, found 200" in result.output
    assert "Traceback" not in result.output


def test_presets_are_valid_shapes() -> None:
    for config in PRESETS.values():
        config.check()
    published = {"dim": 2560, "hidden_dim": 6912, "n_layers": 30, "n_heads": 20, "n_kv_heads": 5}
    assert published.items() <= dataclasses.asdict(PRESETS["2b-4t"]).items()
