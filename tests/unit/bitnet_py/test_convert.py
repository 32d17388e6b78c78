from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py.cli import main
from bitnet_py.convert import convert
from bitnet_py.errors import ModelError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from bitnet_py.weights import Weights
from tests.support.gguf_bytes import ARRAY, F32, STRING, U64, model_container

MakeModel = Callable[..., Path]
SHAPE = {"dim": 256, "hidden_dim": 512, "arch": "bitnet"}


@pytest.fixture
def i2_s(make_model: MakeModel) -> Path:
    return make_model(**SHAPE)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_converted_is_what_would_have_been_written(
    tmp_path: Path, make_model: MakeModel, i2_s: Path, name: str
) -> None:
    done = convert(i2_s, tmp_path / "m.gguf", GGMLType[name.upper()])
    assert (tmp_path / "m.gguf").read_bytes() == make_model(**SHAPE, projections=name).read_bytes()
    assert (done.arch, done.n_matrices, done.activation) == ("bitnet", 14, None)
    assert 0 < done.scale_error <= 2**-11
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("first", [GGMLType.TQ1_0, GGMLType.TQ2_0])
def test_there_and_back_changes_nothing(tmp_path: Path, make_model: MakeModel, first: GGMLType) -> None:
    original = make_model(**SHAPE, projections="tq2_0")
    assert convert(original, tmp_path / "1.gguf", first).scale_error == 0.0
    assert convert(tmp_path / "1.gguf", tmp_path / "2.gguf", GGMLType.I2_S).scale_error == 0.0
    assert convert(tmp_path / "2.gguf", tmp_path / "3.gguf", GGMLType.TQ2_0).scale_error == 0.0
    assert (tmp_path / "3.gguf").read_bytes() == original.read_bytes()


def test_keys_are_copied_as_they_stand(tmp_path: Path) -> None:
    container = model_container(arch="bitnet-25")
    container.with_key("general.alignment", 4, 64)
    container.alignment = 64
    for key, kind, item in (
        ("other.list", ARRAY, (F32, [0.1, 2.0])),
        ("other.words", ARRAY, (STRING, ["", "\u00e9"])),
        ("bitnet-25.big", U64, 1 << 40),
        ("bitnet-25", 4, 3),
    ):
        container.with_key(key, kind, item)
    (tmp_path / "m.gguf").write_bytes(container.to_bytes())
    convert(tmp_path / "m.gguf", tmp_path / "out.gguf", GGMLType.I2_S, arch="bitnet-b1.58")
    with GGUFFile.open(tmp_path / "m.gguf") as old, GGUFFile.open(tmp_path / "out.gguf") as new:
        expected = {key.replace("bitnet-25.", "bitnet-b1.58."): old.raw_value(key) for key in old.metadata} | {
            "general.architecture": struct.pack("<IQ", 8, 12) + b"bitnet-b1.58"
        }
        assert {key: new.raw_value(key) for key in new.metadata} == expected
        assert list(new.tensors) == list(old.tensors)
        for name in old.tensors:
            np.testing.assert_array_equal(new.data(name), old.data(name))
            assert new.tensors[name].offset % 64 == 0
        assert Weights.load(new).config.arch == "bitnet-b1.58"


def test_another_activation_has_to_be_asked_for(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model(dim=256)
    with pytest.raises(ModelError, match=r"bitnet-b1.58 means relu_squared, bitnet means silu: .*another model"):
        convert(model, tmp_path / "m.gguf", GGMLType.TQ2_0, arch="bitnet")
    assert not list(tmp_path.iterdir())
    done = convert(model, tmp_path / "m.gguf", GGMLType.TQ2_0, arch="bitnet", other_activation=True)
    assert done.activation == "silu"


def test_rows_that_are_not_whole_blocks(tmp_path: Path, make_model: MakeModel) -> None:
    with pytest.raises(
        ModelError, match=r"attn_q.weight, row length for TQ1_0: expected a multiple of 256, found 128"
    ):
        convert(make_model(), tmp_path / "m.gguf", GGMLType.TQ1_0)


def test_a_model_is_not_written_over_itself(tmp_path: Path, i2_s: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(i2_s.read_bytes())
    (tmp_path / "link.gguf").symlink_to(copy)
    with pytest.raises(ModelError, match="expected another file"):
        convert(copy, tmp_path / "link.gguf", GGMLType.TQ2_0)
    assert copy.read_bytes() == i2_s.read_bytes()


def test_a_folder_that_does_not_exist(tmp_path: Path, i2_s: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written"):
        convert(i2_s, tmp_path / "absent" / "m.gguf", GGMLType.TQ2_0)


def test_command(tmp_path: Path, i2_s: Path) -> None:
    out = tmp_path / "m.gguf"
    result = CliRunner().invoke(main, ["convert", "--model", str(i2_s), "--projections", "tq2_0", str(out)])
    assert result.exit_code == 0, result.output
    assert "bitnet, 14 matrices as tq2_0, scales rounded, by at most" in result.output
    result = CliRunner().invoke(main, ["convert", "--model", str(out), "--projections", "tq1_0", str(out) + "1"])
    assert "scales unchanged" in result.output


def test_command_says_that_it_is_another_model(tmp_path: Path, make_model: MakeModel) -> None:
    arguments = ["convert", "--model", str(make_model(dim=256)), "--projections", "tq2_0", "--arch", "bitnet"]
    refused = CliRunner().invoke(main, [*arguments, str(tmp_path / "m.gguf")])
    assert refused.exit_code == 4
    assert refused.output.count("\n") == 1
    allowed = CliRunner().invoke(main, [*arguments, "--other-activation", str(tmp_path / "m.gguf")])
    assert allowed.exit_code == 0
    assert "another model than" in allowed.output
    assert "its activation is silu" in allowed.output


@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        ({"arch": "llama"}, "bitnet"),
        ({"arch": "bitnet", "sub_norms": False}, "llama"),
        ({"arch": "bitnet", "scales": True}, "bitnet-b1.58"),
        ({"arch": "bitnet"}, "qwen3"),
        ({"arch": "qwen3"}, "gemma3"),
    ],
)
def test_an_architecture_that_cannot_compute_the_model(
    tmp_path: Path, make_model: MakeModel, shape: dict[str, object], arch: str
) -> None:
    with pytest.raises(ModelError, match=rf"architecture {arch} cannot compute this model of {shape['arch']}"):
        convert(make_model(**shape), tmp_path / "m.gguf", GGMLType.I2_S, arch=arch, other_activation=True)
    assert not list(tmp_path.iterdir())


def test_what_llama_has_is_copied(tmp_path: Path, make_model: MakeModel) -> None:
    more = {"dim": 256, "biases": True, "rope_freqs": True, "scales": True, "rope_scaling": 2.0}
    convert(make_model(arch="llama", **more), tmp_path / "m.gguf", GGMLType.TQ2_0)
    with GGUFFile.open(tmp_path / "m.gguf") as new:
        weights = Weights.load(new)
        assert weights.config.rope_scale == 0.5
        assert weights.rope_factors is not None
        assert weights.layers[1].o.bias is not None
        assert weights.layers[1].o.factor != 1
