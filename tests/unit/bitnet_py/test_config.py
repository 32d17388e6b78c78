from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_py.config import ARCHITECTURES, ModelConfig
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from tests.support.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, U64, Container, model_container

ARCH = "bitnet-b1.58"
F64 = 12


def read(tmp_path: Path, container: Container) -> ModelConfig:
    path = tmp_path / "model.gguf"
    path.write_bytes(container.to_bytes())
    with GGUFFile.open(path) as gguf:
        return ModelConfig.from_gguf(gguf)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reads_the_shape_and_the_defaults(tmp_path: Path, arch: str) -> None:
    assert read(tmp_path, model_container(arch=arch)) == ModelConfig(
        arch=arch,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        head_dim=64,
        dim=128,
        hidden_dim=256,
        vocab_size=4,
        context_length=64,
        rope_base=10000.0,
        rms_eps=float(np.float32(1e-5)),
    )


def with_head_size(head_dim: int) -> Container:
    container = model_container().with_key(f"{ARCH}.attention.key_length", U32, head_dim)
    container = container.with_key(f"{ARCH}.attention.value_length", U32, head_dim)
    return container.with_key(f"{ARCH}.rope.dimension_count", U32, head_dim)


def test_head_size_of_its_own(tmp_path: Path) -> None:
    config = read(tmp_path, with_head_size(128))
    assert (config.head_dim, config.dim, config.q_dim, config.kv_dim) == (128, 128, 256, 128)


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(63, "an even head size"), (32, r"a multiple of 128 \(I2_S blocks\), found 64")]
)
def test_head_sizes_the_engine_cannot_run(tmp_path: Path, head_dim: int, expected: str) -> None:
    with pytest.raises(ModelError, match=f"attention.key_length: expected {expected}"):
        read(tmp_path, with_head_size(head_dim))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_an_architecture_implies(tmp_path: Path, arch: str) -> None:
    architecture = read(tmp_path, model_container(arch=arch)).architecture
    activation = {"bitnet": "silu", "llama": "silu", "qwen3": "silu", "gemma3": "gelu"}.get(arch, "relu_squared")
    pairing = "adjacent" if arch == "llama" else "halves"
    assert (architecture.activation, architecture.rope_pairing) == (activation, pairing)
    assert architecture.sub_norms == (arch != "llama")
    of_vectors = arch in ("qwen3", "gemma3")
    assert (architecture.head_norms, architecture.input_norms, architecture.in_march) == (
        of_vectors,
        of_vectors,
        not of_vectors,
    )
    only_gemma = (architecture.post_norms, architecture.scales_embedding, architecture.scales_query)
    assert only_gemma == (arch == "gemma3",) * 3


@pytest.mark.parametrize(("n_layers", "width"), [(1, 128), (62, 64)])
def test_gemma3_scales_embedding_and_query(tmp_path: Path, n_layers: int, width: int) -> None:
    """The 27B model, known by its layers, has another factor: that of dim / n_heads."""
    container = model_container(arch="gemma3").with_key("gemma3.block_count", U32, n_layers)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        container = container.with_key(f"gemma3.{key}", U32, 128)
    container = container.with_key("gemma3.attention.head_count", U32, 2)
    config = read(tmp_path, container)
    assert config.embedding_scale == float(np.sqrt(np.float32(128)))
    assert config.query_scale == float(1 / np.sqrt(np.float32(width)))


def test_others_scale_scores(tmp_path: Path) -> None:
    config = read(tmp_path, model_container(arch="qwen3"))
    assert (config.embedding_scale, config.query_scale) == (1.0, None)


@pytest.mark.parametrize(("number", "name"), [*enumerate(("none", "mean", "cls", "last"))])
def test_pooling(tmp_path: Path, number: int, name: str) -> None:
    assert read(tmp_path, model_container().with_key(f"{ARCH}.pooling_type", U32, number)).pooling == name


@pytest.mark.parametrize(
    ("key", "kind", "value", "expected"),
    [
        ("pooling_type", U32, 4, r"0 \(none\), 1 \(mean\), 2 \(cls\), 3 \(last\), found '4'"),
        ("attention.causal", BOOL, False, "true"),
        ("attention.sliding_window", U32, 512, "0"),
        ("final_logit_softcapping", F32, 30.0, "0"),
    ],
)
@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_what_embedding_models_must_not_have(
    tmp_path: Path, arch: str, key: str, kind: int, value: object, expected: str
) -> None:
    name = f"{arch}.{key}"
    with pytest.raises(ModelError, match=f"key {name}: expected {expected}"):
        read(tmp_path, model_container(arch=arch).with_key(name, kind, value))


def test_rows_of_3b_are_no_blocks(tmp_path: Path) -> None:
    """1bitLLM/bitnet_b1_58-3B: no I2_S file of it can be right."""
    container = model_container(arch="bitnet").with_key("bitnet.feed_forward_length", U32, 8640)
    with pytest.raises(ModelError, match=r"found 8640 \(8640 % 128 = 64\); rows that are no whole blocks"):
        read(tmp_path, container)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scale_linear": 2.0}, 0.5),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scaling.factor": 3.0}, float(np.float32(1) / np.float32(3))),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 2.0}, 1.0),
    ],
)
def test_linear_scaling(tmp_path: Path, keys: dict[str, object], scale: float) -> None:
    """The old key counts only where the new one is missing."""
    container = model_container()
    for key, value in keys.items():
        container = container.with_key(f"{ARCH}.{key}", STRING if isinstance(value, str) else F32, value)
    assert read(tmp_path, container).rope_scale == scale


def test_kv_heads_default_to_heads(tmp_path: Path) -> None:
    config = read(tmp_path, model_container().without(f"{ARCH}.attention.head_count_kv"))
    assert config.n_kv_heads == config.n_heads == 2
    assert config.kv_dim == 128


def test_values_are_those_of_a_float32(tmp_path: Path) -> None:
    container = model_container().with_key(f"{ARCH}.attention.layer_norm_rms_epsilon", F64, 1e-6)
    assert read(tmp_path, container).rms_eps == float(np.float32(1e-6)) != 1e-6


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("rope.scaling.type", STRING, "none"),
        ("rope.scaling.type", STRING, "linear"),
        ("rope.scaling.factor", F32, 1.0),
        ("rope.scaling.factor", F32, 0.0),
        ("rope.dimension_count", U32, 64),
        ("attention.key_length", U32, 64),
        ("vocab_size", U32, 4),
        ("block_count", U64, 1),
        ("feed_forward_length", ARRAY, (I32, [256])),
        ("expert_count", U32, 0),
    ],
)
def test_accepts_what_means_the_same(tmp_path: Path, key: str, kind: int, value: object) -> None:
    assert read(tmp_path, model_container().with_key(f"{ARCH}.{key}", kind, value)) == read(
        tmp_path, model_container()
    )


@pytest.mark.parametrize(
    ("key", "kind", "value", "expected"),
    [
        pytest.param("block_count", U32, 0, "an integer from 1 to 512", id="no layers"),
        pytest.param("block_count", U32, 100000, "an integer from 1 to 512", id="absurd layers"),
        pytest.param("block_count", U64, 1 << 63, "an integer from 1 to 512", id="layers of 2^63"),
        pytest.param("block_count", F32, 1.0, "an integer", id="float for integer"),
        pytest.param("block_count", BOOL, 1, "an integer", id="bool for integer"),
        pytest.param("block_count", STRING, "1", "an integer", id="string for integer"),
        pytest.param("embedding_length", U32, 1 << 20, "an integer from 1 to 131072", id="absurd dim"),
        pytest.param("embedding_length", U32, 192, "a multiple of 128", id="dim not whole blocks"),
        pytest.param("feed_forward_length", U32, 200, "a multiple of 128", id="hidden not whole blocks"),
        pytest.param("feed_forward_length", ARRAY, (I32, [256, 512]), "an integer", id="layers differ"),
        pytest.param("attention.head_count", U32, 3, "a multiple of 3 heads", id="heads do not divide dim"),
        pytest.param("attention.head_count", U32, 128, "an even head size", id="odd head size"),
        pytest.param("attention.head_count_kv", U32, 3, "a divisor of 2 heads", id="too many KV heads"),
        pytest.param("context_length", U32, 0, "an integer from 1", id="no context"),
        pytest.param("vocab_size", U32, 5, "4, the tokens of the vocabulary", id="vocabulary disagrees"),
        pytest.param("rope.dimension_count", U32, 32, "64, the head size", id="partial RoPE"),
        pytest.param("attention.key_length", U32, 32, "32, the head size", id="keys alone have another size"),
        pytest.param("attention.key_length", U32, 0, "an integer from 1 to 65536", id="no key size"),
        pytest.param("attention.value_length", U32, 32, "64, the head size", id="other value length"),
        pytest.param("rope.freq_base", F32, 0.0, "a finite number above 0", id="base 0"),
        pytest.param("rope.freq_base", F32, float("nan"), "a finite number above 0", id="base NaN"),
        pytest.param("rope.freq_base", STRING, "10000", "a number", id="base as string"),
        pytest.param("rope.scaling.type", STRING, "yarn", "none", id="yarn"),
        pytest.param("rope.scaling.type", STRING, "longrope", "none or linear", id="longrope"),
        pytest.param("rope.scaling.factor", F32, -2.0, "a finite number above 0", id="scaled by less than 0"),
        pytest.param("rope.scaling.factor", F32, 1e-38, "a factor from 1e-30", id="scaled by nearly 0"),
        pytest.param("rope.scaling.factor", ARRAY, (F32, [1.0, 2.0]), "a number", id="a factor per layer"),
        pytest.param("rope.scaling.attn_factor", F32, 0.5, "1.0", id="attention factor"),
        pytest.param("rope.scaling.type", ARRAY, (F32, [1.0, 2.0]), "none", id="array for string"),
        pytest.param("attention.layer_norm_rms_epsilon", F32, 0.0, "a finite number above 0", id="eps 0"),
        pytest.param("attention.layer_norm_rms_epsilon", F32, -1e-5, "a finite number above 0", id="eps negative"),
        pytest.param(
            "attention.layer_norm_rms_epsilon", F32, float("inf"), "a finite number above 0", id="eps inf"
        ),
        pytest.param(
            "attention.layer_norm_rms_epsilon", F64, 1e300, "a finite number above 0", id="eps overflows"
        ),
        pytest.param(
            "attention.layer_norm_rms_epsilon", F64, 1e-60, "a finite number above 0", id="eps underflows"
        ),
        pytest.param("expert_count", U32, 8, "0", id="experts"),
    ],
)
def test_refuses_what_the_engine_cannot_run(
    tmp_path: Path, key: str, kind: int, value: object, expected: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, model_container().with_key(f"{ARCH}.{key}", kind, value))
    message = str(caught.value)
    assert f"expected {expected}" in message
    assert f"{ARCH}." in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_required_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match=rf"key {ARCH}.{key}: expected the key, found no such key"):
        read(tmp_path, model_container().without(f"{ARCH}.{key}"))


def test_vocabulary_size_needs_a_key_or_tokens(tmp_path: Path) -> None:
    container = model_container().without("tokenizer.ggml.tokens")
    with pytest.raises(ModelError, match="vocab_size: expected the key"):
        read(tmp_path, container)
    assert read(tmp_path, container.with_key(f"{ARCH}.vocab_size", U32, 4)).vocab_size == 4


@pytest.mark.parametrize(
    ("kind", "value", "found"), [(STRING, "mamba", "'mamba'"), (STRING, "bitnet2", "'bitnet2'"), (U32, 3, "'3'")]
)
def test_other_architectures(tmp_path: Path, kind: int, value: object, found: str) -> None:
    with pytest.raises(ModelError, match=rf"expected {' or '.join(ARCHITECTURES)}, found {found}"):
        read(tmp_path, model_container().with_key("general.architecture", kind, value))


def test_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no such key"):
        read(tmp_path, model_container().without("general.architecture"))
