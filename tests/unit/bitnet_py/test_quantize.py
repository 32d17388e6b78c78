"""``bitnet quantize``: the tensors that bitnet.cpp's converters write where those are right; the file runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

import crossval
from bitnet_py import cli, tokenizer_names
from bitnet_py.arithmetic import GENERATIONS
from bitnet_py.checkpoint import Checkpoint
from bitnet_py.config import ARCHITECTURES
from bitnet_py.errors import BitnetError, TokenizerError
from bitnet_py.gguf import GGMLType, GGUFFile
from bitnet_py.model import Model
from bitnet_py.pretokenizer import get_pre_type
from bitnet_py.quantize import quantize
from bitnet_py.ternarise import absmean, convention_of, unpacked
from bitnet_py.tokenizer import Tokenizer as OurTokenizer
from tests.support.checkpoints import TEMPLATE, Small, from_bfloat16, to_bfloat16, write_safetensors

CONVERTED = json.loads((Path(__file__).parents[2] / "data" / "converted.json").read_text())
"""What bitnet.cpp's converters (``generation``) wrote of these checkpoints: sha256 over names and bytes of all
tensors without the scales, and the scales. From float32 files: after ``quantize_i2_s``, as llama-quantize does.
The converters ran with NumPy in place of PyTorch, whose mean may differ in the last bits; for ``falcon3`` with
PyTorch, transformers and llama-quantize themselves. Its ``keys``: sha256 over architecture and tokenizer."""
CHECKPOINTS = {
    "bf16": Small(seed=11),
    "packed": Small(packed="autobitlinear", seed=12),
    "f32": Small(dtype="F32", seed=15),
    "largef16": Small("large", dtype="F16", seed=14),
    "llamapacked": Small("llama", packed="bitlinear", seed=17, tied=False),
    "falcon3": Small("llama", packed="bitlinear", rule="falcon3", seed=21, tied=False),
}
CHECKPOINTS["falcon3"].config |= {"bos_token_id": 298, "head_dim": 128}
no_llama = pytest.mark.skipif("llama" not in ARCHITECTURES, reason="the engine does not run architecture llama")
NAMES = [pytest.param(name, marks=no_llama) if "llama" in name else name for name in CHECKPOINTS]


def known_as(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Let the converter's table name this tokenizer."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(tokenizer_names.TEXT).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(tokenizer_names.NAMES, digest, name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def convert(name: str) -> Path:
        folder = CHECKPOINTS[name].write(tmp_path_factory.mktemp("checkpoint"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            if CHECKPOINTS[name].rule != "llama-bpe":
                known_as(monkeypatch, folder, CHECKPOINTS[name].rule)
            quantize(folder, folder / "m.gguf")
        return folder / "m.gguf"

    return convert


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_converters(converted: Callable[[str], Path], name: str) -> None:
    digest, scales = hashlib.sha256(), {}
    with GGUFFile.open(converted(name)) as gguf:
        for tensor in sorted(gguf.tensors):
            data = gguf.data(tensor)
            if gguf.tensors[tensor].type is GGMLType.I2_S:
                assert not data[-28:].any()
                scales[tensor], data = data[-32:-28].view("<f4")[0], data[:-32]
            digest.update(tensor.encode() + data.tobytes())
    recorded = CONVERTED[name]
    assert digest.hexdigest() == recorded["sha256"]
    assert scales.keys() == recorded["scales"].keys()
    # Masters in 32 bits: the last bits are the order in which the mean was summed.
    most = 2 if name in ("bf16", "f32") else 0
    for tensor, scale in scales.items():
        assert abs(scale.view(np.int32) - np.float32(recorded["scales"][tensor]).view(np.int32)) <= most, tensor


def test_keys_are_those_of_the_converter(converted: Callable[[str], Path]) -> None:
    with GGUFFile.open(converted("falcon3")) as gguf:
        keys = {name: gguf.metadata[name] for name in gguf.metadata if name.startswith(("tokenizer.", "llama."))}
        assert [keys.pop(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")] == [
            False,
            False,
        ]  # ours alone
        plain = {
            name: value if isinstance(value, str | int | float) else list(map(_plain, value))
            for name, value in keys.items()
        }
        assert (
            hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest() == CONVERTED["falcon3"]["keys"]
        )


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def test_header_and_tokenizer(converted: Callable[[str], Path]) -> None:
    small = CHECKPOINTS["bf16"]
    with GGUFFile.open(converted("bf16")) as gguf:
        keys = {name: gguf.metadata.get(f"bitnet-b1.58.{name}") for name in ("rope.freq_base", "context_length")}
        assert keys == {"rope.freq_base": small.config["rope_theta"], "context_length": 512}
        assert gguf.metadata["general.file_type"] == 40
        assert gguf.metadata["tokenizer.ggml.pre"] == "llama-bpe"
        assert gguf.metadata["tokenizer.chat_template"] == TEMPLATE
        assert len(gguf.metadata["tokenizer.ggml.tokens"]) == small.vocab


def test_a_tokenizer_of_falcon3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small("llama", packed="bitlinear", rule="falcon3", tied=False, n_layers=1)
    small.config |= {"bos_token_id": 298, "eos_token_id": 0, "head_dim": 128}
    folder = small.write(tmp_path)
    with pytest.raises(TokenizerError, match="not one of llama-bpe"):
        quantize(folder, folder / "m.gguf")
    known_as(monkeypatch, folder, "falcon3")
    made = quantize(folder, folder / "m.gguf")
    assert (made.arch, made.pre, made.warnings) == ("llama", "falcon3", ())
    with GGUFFile.open(folder / "m.gguf") as gguf:
        keys = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf.metadata.items()}
        eos = list(keys["tokens"]).index(json.loads((folder / "tokenizer_config.json").read_text())["eos_token"])
        named = {name: keys.get(f"{name}_token_id") for name in ("bos", "eos", "padding", "unknown")}
        # BOS by its id in config.json; EOS by its text, which comes before the id.
        assert named == {"bos": 298, "eos": eos, "padding": 299, "unknown": None}
        assert (keys["pre"], keys["add_bos_token"], keys["add_eos_token"]) == ("falcon3", False, False)
        theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for generation in GENERATIONS:  # main's rule for falcon3 is another, but no BOS is added there either
            ours = OurTokenizer.from_gguf(gguf, generation)
            assert ours.encode("old river") == theirs.encode("old river").ids
        text = "It's 1234 (or 5), isn't it?\n\n  x=`1`;"
        assert OurTokenizer.from_gguf(gguf).encode(text) == theirs.encode(text).ids
    assert crossval.check_weights(folder / "m.gguf", against=folder).verdict == "pass"


def test_a_tokenizer_that_bitnet_cpp_reads_otherwise_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Small("llama", rule="falcon_e", n_layers=1).write(tmp_path)
    known_as(monkeypatch, folder, "falcon_e")
    result = CliRunner().invoke(cli.main, ["quantize", str(folder), str(folder / "m.gguf")])
    assert result.exit_code == 0, result.output
    assert "warning: bitnet.cpp's rule falcon_e reads text otherwise than tokenizer.json" in result.stderr


def test_a_name_is_that_of_one_vocabulary() -> None:
    assert tokenizer_names.name_of([1, 2]) is None
    assert {get_pre_type(name).name for name in tokenizer_names.NAMES.values()} == set(
        tokenizer_names.NAMES.values()
    )


@pytest.mark.parametrize("stated", [True, False])
def test_the_tokenizers_configuration_says_whether_bos_is_added(tmp_path: Path, stated: bool) -> None:
    folder = Small(n_layers=1).write(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": stated}))
    quantize(folder, folder / "m.gguf")
    with GGUFFile.open(folder / "m.gguf") as gguf:
        assert gguf.metadata["tokenizer.ggml.add_bos_token"] is stated


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    folder = Small(vocab=320, n_layers=1).write(tmp_path)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    special = max(item["id"] for item in vocabulary["added_tokens"])
    vocabulary["added_tokens"] = [one for one in vocabulary["added_tokens"] if one["id"] != special]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    quantize(folder, folder / "m.gguf")
    with GGUFFile.open(folder / "m.gguf") as gguf:
        assert gguf.metadata["tokenizer.ggml.tokens"][319] == "[PAD319]"
    assert crossval.check_weights(folder / "m.gguf", against=folder).verdict == "pass"


@pytest.mark.parametrize("name", ["bf16", "packed", pytest.param("llamapacked", marks=no_llama)])
def test_what_was_written_runs_and_holds_what_its_checkpoint_says(
    converted: Callable[[str], Path], name: str
) -> None:
    file = converted(name)
    made = crossval.compare_engines("Hello there", file, reference="spec", n_threads=1, n_decode=1)
    assert made["audit"]["candidate"]["verdict"] == "clean"
    assert made.verdict == "parity"
    assert crossval.check_weights(file, against=file.parent).verdict == "pass"
    with Model.from_gguf(file, n_threads=1) as model:
        assert model.tokenizer.encode("Hello there")[0] == model.tokenizer.vocabulary.bos_id


def test_shards_and_one_file_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for shards in (1, 3):
        folder = CHECKPOINTS["bf16"].write(tmp_path / str(shards) / "same", shards=shards)
        quantize(folder, tmp_path / "m.gguf")
        digests.add(hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest())
    quantize(tmp_path / "1" / "same" / "model.safetensors", tmp_path / "m.gguf")
    digests.add(hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_absmean_by_hand() -> None:
    codes, scale = absmean(np.array([[0.5, -0.5, 0.25, 2.0], [0.0, -1.0, 0.75, -3.0]], np.float32))
    assert scale == 1.0
    assert codes.tolist() == [[1, 1, 1, 2], [1, 0, 2, 0]]  # half to even: 0.5 is 0
    assert absmean(np.zeros((2, 128), np.float32))[1] == float(np.float32(1) / (np.float32(1) / np.float32(1e-5)))
    with pytest.raises(BitnetError, match="NaN or infinity"):
        absmean(np.array([[np.inf]], np.float32))


@pytest.mark.parametrize(
    ("config", "divides"),
    [
        ({}, True),
        ({"quantization_config": {"quant_method": "bitnet"}}, True),
        ({"quantization_config": {"linear_class": "bitlinear"}}, True),
        ({"quantization_config": {"linear_class": "autobitlinear", "quantization_mode": "offline"}}, False),
        ({"quantization_config": {"linear_class": "autobitlinear", "quantization_mode": "online"}}, None),
        ({"quantization_config": {"linear_class": "other"}}, None),
    ],
)
def test_both_conventions_of_weight_scale(config: dict[str, object], divides: bool | None) -> None:
    if divides is None:
        with pytest.raises(BitnetError, match="not known"):
            convention_of(config)
        return
    packed = np.array([[0b10_01_00_10]], np.uint8)
    found = unpacked(packed, np.array([4.0], np.float32), convention_of(config))
    assert found.scale == (0.25 if divides else 4.0)
    assert found.codes.tolist() == [[2], [0], [1], [2]]


def write(change: Callable[[Small], object], folder: Path, **options: object) -> Path:
    small = Small(n_layers=1, **options)  # type: ignore[arg-type]
    change(small)
    return small.write(folder)


def put(name: str, dtype: str, array: np.ndarray) -> Callable[[Small], object]:
    return lambda small: small.tensors.update({name: (dtype, array)})


def spoil(name: str, value: float) -> Callable[[Small], object]:
    def change(small: Small) -> None:
        bits = small.tensors[name][1].copy()
        bits.reshape(-1)[3] = to_bfloat16(np.array([value]))[0]
        small.tensors[name] = "BF16", bits

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
UNUSABLE: dict[str, tuple[Callable[[Small], object], dict[str, object], str]] = {
    "other architecture": (lambda s: s.config.update(architectures=["MambaForCausalLM"]), {}, "MambaForCausalLM"),
    "no architecture": (lambda s: s.config.pop("architectures"), {}, "architectures"),
    "activation": (lambda s: s.config.update(hidden_act="gelu"), {}, "hidden_act.*'gelu'"),
    "RoPE scaling": (lambda s: s.config.update(rope_scaling={"rope_type": "yarn"}), {}, "rope_scaling.*'yarn'"),
    "no base": (lambda s: s.config.pop("rope_theta"), {}, "rope_theta"),
    "heads": (lambda s: s.config.update(num_key_value_heads=3), {}, "num_key_value_heads"),
    "text": (lambda s: s.config.update(hidden_size="many"), {}, "hidden_size.*'many'"),
    "missing tensor": (lambda s: s.tensors.pop(Q), {}, "q_proj"),
    "bias": (put("model.layers.0.self_attn.q_proj.bias", "F32", np.zeros(256, "<f4")), {}, "q_proj.bias"),
    "shape": (put(Q, "F32", np.zeros((256, 128), "<f4")), {}, r"shape.*\(256, 256\).*\(256, 128\)"),
    "integer": (put(Q, "I32", np.zeros((256, 256), "<i4")), {}, "type.*I32"),
    "packed without scale": (lambda s: s.tensors.pop(f"{Q}_scale"), {"packed": "bitlinear"}, "q_proj.*shape"),
    "code 3": (put(Q, "U8", np.full((64, 256), 255, "u1")), {"packed": "bitlinear"}, "found 3"),
    "zero scale": (put(f"{Q}_scale", "F32", np.zeros(1, "<f4")), {"packed": "bitlinear"}, "weight_scale"),
    "unknown class": (
        lambda s: s.config.update(quantization_config={"linear_class": "x"}),
        {"packed": "bitlinear"},
        "linear_class",
    ),
    "NaN": (spoil(Q, np.nan), {}, "q_proj.*NaN"),
    "norm": (spoil("model.norm.weight", np.inf), {}, "model.norm.*infinity"),
    "large embedding": (spoil("model.embed_tokens.weight", 1e5), {}, "embed_tokens.*float16"),
    "no head": (lambda s: s.config.update(tie_word_embeddings=False), {}, "lm_head"),
    "row length": (lambda s: None, {"hidden": 192}, "row length.*128"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_checkpoint_is_one_clear_line_and_no_file(tmp_path: Path, name: str) -> None:
    change, options, message = UNUSABLE[name]
    folder, out = write(change, tmp_path / "c", **options), tmp_path / "m.gguf"
    result = CliRunner().invoke(cli.main, ["quantize", str(folder), str(out)])
    assert (result.exit_code, result.stdout) == (4, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    with pytest.raises(BitnetError, match=f"(?s){message}"):
        quantize(folder, out)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json.*no such file"),
        (lambda f: (f / "config.json").write_text("[1]"), "a JSON object"),
        (lambda f: (f / "config.json").write_text("{"), "JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.model, found none"),
        (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "not a SentencePiece model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
            "safetens",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "0 such files"),
        (
            lambda f: (f / "model.safetensors").rename(f / "a.safetensors").with_stem("b").write_bytes(b""),
            "2 such files",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "a file name",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
            "a regular file",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors"}}'
            ),
            "no such tensor",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = write(lambda small: None, tmp_path / "c")
    damage(folder)
    with pytest.raises(BitnetError, match=f"(?s){message}"):
        quantize(folder, tmp_path / "m.gguf")


def test_bfloat16_and_rows_are_read_as_written(tmp_path: Path) -> None:
    bits = np.arange(0, 65536, 7, dtype=np.uint16)[:9000].reshape(90, 100)
    (tmp_path / "config.json").write_text("{}")
    single = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_safetensors(tmp_path / "a.safetensors", {"y": ("F32", single), "x": ("BF16", bits)})
    with Checkpoint.open(tmp_path / "a.safetensors") as checkpoint:
        assert np.array_equal(checkpoint.tensor("x").view("<u4"), from_bfloat16(bits).view("<u4"))
        assert np.array_equal(checkpoint.rows("x", slice(3, 5)).view("<u4"), from_bfloat16(bits[3:5]).view("<u4"))
        assert np.array_equal(checkpoint.rows("y", slice(1, 3)), single[1:])
        assert (checkpoint.dtype("x"), checkpoint.shape("x"), "z" in checkpoint) == ("bfloat16", (90, 100), False)
        with pytest.raises(BitnetError, match="'z'"):
            checkpoint.tensor("z")
