from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGMLType, GGUFFile
from tests.support.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, Container, Tensor, small_container

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_bytes(data: bytes) -> Path:
        path = tmp_path / "some.gguf"
        path.write_bytes(data)
        return path

    return write_bytes


def refuse(path: Path, *parts: str) -> str:
    """Assert that opening fails with one line that names the file and holds every part; return it."""
    with pytest.raises(ModelError) as caught:
        GGUFFile.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message
    return message


def test_reads_every_kind_of_value_and_tensor(write: Write) -> None:
    with GGUFFile.open(write(small_container().to_bytes())) as file:
        assert file.version == 3
        assert not file.metadata["numbers"].flags.writeable
        metadata = dict(file.metadata)
        assert metadata.pop("numbers").tolist() == [1, -2, 3]
        assert metadata.pop("switches").tolist() == [True, False]
        assert metadata.pop("empty").shape == (0,)
        assert metadata == {
            "general.architecture": "bitnet-b1.58",
            "count": 7,
            "signed": -7,
            "big": 1 << 40,
            "ratio": 0.5,
            "flag": True,
            "words": ["a", "", "\u0120the", "x" * 40],
        }
        assert file.metadata["flag"] is True
        assert {name: (info.shape, info.type) for name, info in file.tensors.items()} == {
            "norm": ((8,), GGMLType.F32),
            "embd": ((2, 3), GGMLType.F16),
            "w": ((2, 128), GGMLType.I2_S),
        }
        assert file.data("norm").view("<f4").tolist() == list(range(8))
        assert file.data("embd").tobytes() == bytes(range(12))
        assert file.data("w").size == 2 * 128 // 4 + 32
        assert file.tensors["w"].size_bytes == 96


def test_reads_version_2_and_another_alignment(write: Write) -> None:
    container = small_container().with_key("general.alignment", U32, 64)
    container.version, container.alignment = 2, 64
    with GGUFFile.open(write(container.to_bytes())) as file:
        assert all(info.offset % 64 == 0 for info in file.tensors.values())
        assert file.data("norm").view("<f4")[7] == 7


def test_views_are_read_only_and_outlive_the_file(write: Write) -> None:
    with GGUFFile.open(write(small_container().to_bytes())) as file:
        view = file.data("norm")
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    assert view.view("<f4")[3] == 3
    with pytest.raises(ModelError, match="after the file was closed"):
        file.data("norm")


def test_unknown_tensor_name_is_an_error(write: Write) -> None:
    with GGUFFile.open(write(small_container().to_bytes())) as file, pytest.raises(ModelError, match="'absent'"):
        file.data("absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a platform with FIFOs")
def test_special_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "a special file")


@pytest.mark.parametrize(
    ("name", "found"),
    [("absent.gguf", "found nothing"), (".", "a directory"), ("a\nb.gguf", "found nothing"), ("a\0b", "null")],
)
def test_paths_that_lead_to_no_file(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(ModelError, match=found) as caught:
        GGUFFile.open(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "parts"),
    [(b"", ("0 bytes",)), (b"\x80\x02PK" + bytes(100), ("magic", "b'GGUF'", "not a GGUF file"))],
)
def test_files_that_are_something_else(write: Write, data: bytes, parts: tuple[str, ...]) -> None:
    refuse(write(data), *parts)


@pytest.mark.parametrize(("version", "found"), [(0, "0"), (1, "1"), (4, "4"), (3 << 24, "big-endian")])
def test_other_versions(write: Write, version: int, found: str) -> None:
    container = small_container()
    container.version = version
    refuse(write(container.to_bytes()), "version", found)


def test_every_truncation_is_refused(write: Write) -> None:
    data = small_container().to_bytes()
    path = write(data)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        refuse(path)


def test_bytes_after_the_last_tensor_are_allowed(write: Write) -> None:
    GGUFFile.open(write(small_container().to_bytes() + bytes(17))).close()


@pytest.mark.parametrize("count", [1 << 20, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("what", ["n_keys", "n_tensors"])
def test_absurd_counts(write: Write, what: str, count: int) -> None:
    container = small_container()
    setattr(container, what, count)
    refuse(write(container.to_bytes()), "number of", str(count))


def key(name: str, kind: int, body: bytes) -> bytes:
    """Return a container of one key whose value is given as raw bytes."""
    return (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name.encode()
        + struct.pack("<I", kind) + body + bytes(256)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "body", "parts"),
    [
        pytest.param(13, b"", ("a GGUF value type", "found 13"), id="unknown value type"),
        pytest.param(0xFFFFFFFF, b"", ("a GGUF value type",), id="huge value type"),
        pytest.param(BOOL, b"\x02", ("a boolean",), id="boolean 2"),
        pytest.param(STRING, struct.pack("<Q", 1 << 62), ("length of string",), id="string past the end"),
        pytest.param(
            STRING, struct.pack("<Q", 300), ("at most 256 bytes, found 300",), id="string to after the end"
        ),
        pytest.param(STRING, struct.pack("<Q", (1 << 64) - 8), ("length of string",), id="string length wraps"),
        pytest.param(STRING, struct.pack("<Q", 2) + b"\xff\xfe", ("UTF-8",), id="string not UTF-8"),
        pytest.param(ARRAY, struct.pack("<IQ", ARRAY, 1), ("found an array",), id="nested array"),
        pytest.param(ARRAY, struct.pack("<IQ", 99, 1), ("found type 99",), id="unknown element type"),
        pytest.param(ARRAY, struct.pack("<IQ", I32, 1 << 61), ("at most 64 elements",), id="array past the end"),
        pytest.param(ARRAY, struct.pack("<IQ", I32, (1 << 62) + 1), ("length of",), id="array length wraps"),
        pytest.param(ARRAY, struct.pack("<IQ", STRING, 1 << 40), ("at most",), id="string array past the end"),
        pytest.param(
            ARRAY, struct.pack("<IQ", BOOL, 2) + b"\x01\x07", ("booleans 0 or 1",), id="array of bad booleans"
        ),
    ],
)
def test_bad_values(write: Write, kind: int, body: bytes, parts: tuple[str, ...]) -> None:
    refuse(write(key("some.key", kind, body)), "some.key", *parts)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IQ", STRING, 1 << 60),
        struct.pack("<IQ", I32, 1 << 60),
        struct.pack("<IQ", STRING, 30 << 20),
    ],
)
def test_lying_lengths_allocate_nothing(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(key("k", ARRAY, body))
    os.truncate(path, 256 << 20)  # sparse: plenty of "remaining bytes" to lie about
    tracemalloc.start()
    try:
        refuse(path, "'k'")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["", "count"])
def test_a_key_that_is_empty_or_there_twice(write: Write, name: str) -> None:
    container = small_container()
    container.keys.append((name, U32, 8))
    refuse(write(container.to_bytes()), "a new, non-empty key", f"'{name}'")


@pytest.mark.parametrize(
    ("kind", "value"), [(U32, 0), (U32, 24), (U32, 4), (U32, 1 << 31), (STRING, "32"), (F32, 32.0)]
)
def test_bad_alignment(write: Write, kind: int, value: object) -> None:
    refuse(write(small_container().with_key("general.alignment", kind, value).to_bytes()), "general.alignment")


def tensors(*entries: Tensor) -> bytes:
    return Container(tensors=list(entries)).to_bytes()


NORM = bytes(32)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        pytest.param(Tensor("", (8,), 0, NORM), ("a name",), id="no name"),
        pytest.param(Tensor("n" * 65, (8,), 0, NORM), ("at most 64 bytes",), id="long name"),
        pytest.param(Tensor(b"\xff", (8,), 0, NORM), ("UTF-8",), id="name not UTF-8"),
        pytest.param(Tensor("t", (), 0, NORM), ("1 to 4", "found 0"), id="no dimensions"),
        pytest.param(Tensor("t", (1,) * 5, 0, NORM), ("1 to 4", "found 5"), id="five dimensions"),
        pytest.param(Tensor("t", (8,), 0, NORM, n_dims=1 << 31), ("1 to 4",), id="2^31 dimensions"),
        pytest.param(Tensor("t", (8, 0), 0, NORM), ("at least 1",), id="zero dimension"),
        pytest.param(Tensor("t", (8,), 4, NORM), ("a type that is read here", "found 4"), id="removed type"),
        pytest.param(Tensor("t", (8,), 999, NORM), ("a type that is read here", "found 999"), id="unknown type"),
        pytest.param(Tensor("t", (8, 128), 38, NORM), ("found TL1 (38)", "take the model's I2_S file"), id="TL1"),
        pytest.param(Tensor("t", (8, 128), 39, NORM), ("TL2 of bitnet.cpp of March 2026", "I2_S"), id="TL2"),
        pytest.param(Tensor("t", (8, 128), 42, NORM), ("TL2 of bitnet.cpp's main", "I2_S"), id="TL2 of main"),
        pytest.param(Tensor("t", (8, 128), 23, NORM), ("found IQ4_XS (23)", "convert"), id="IQ4_XS"),
        pytest.param(Tensor("t", (33,), 8, NORM), ("a multiple of 32", "found 33"), id="part of a block"),
        pytest.param(Tensor("t", (8,), 0, NORM, offset=8), ("a multiple of 32", "found 8"), id="misaligned"),
        pytest.param(Tensor("t", (9,), 0, NORM), ("inside the file",), id="past the end"),
        pytest.param(Tensor("t", (8,), 0, NORM, offset=(1 << 64) - 32), ("inside the file",), id="offset wraps"),
        pytest.param(Tensor("t", (1 << 62, 4), 0, NORM), ("inside the file",), id="size wraps"),
        pytest.param(Tensor("t", (1 << 63, 1 << 63, 2), 1, NORM), ("inside the file",), id="element count wraps"),
        pytest.param(Tensor("t", (1, 128), 36, bytes(32)), ("inside the file",), id="I2_S without its scale"),
    ],
)
def test_bad_tensors(write: Write, entry: Tensor, parts: tuple[str, ...]) -> None:
    refuse(write(tensors(entry)), *parts)


def test_duplicate_tensor(write: Write) -> None:
    refuse(
        write(tensors(Tensor("t", (8,), 0, NORM), Tensor("t", (8,), 0, NORM))), "unique tensor names", "'t' twice"
    )


def test_overlapping_tensors(write: Write) -> None:
    first, second = Tensor("a", (16,), 0, bytes(64)), Tensor("b", (8,), 0, NORM, offset=32)
    refuse(write(tensors(first, second)), "tensor 'b'", "after 'a'")


def test_tensors_need_not_be_in_file_order(write: Write) -> None:
    data = tensors(
        Tensor("b", (8,), 0, struct.pack("<8f", *[2] * 8), offset=32), Tensor("a", (8,), 0, NORM, offset=0)
    )
    with GGUFFile.open(write(data)) as file:
        assert file.data("b").view("<f4").tolist() == [2] * 8
        assert file.data("a").view("<f4").tolist() == [0] * 8


def test_control_characters_from_the_file_stay_out_of_the_message(write: Write) -> None:
    message = refuse(write(tensors(Tensor("evil\n\x1b[31m", (8,), 999, NORM))))
    assert message.isprintable()


def test_agrees_with_the_gguf_package(shipped_model: Path) -> None:
    """The ``gguf`` package reads the keys, but stops at tensor type 36; so only keys are compared."""
    gguf = pytest.importorskip("gguf")

    class KeysOnly(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def _build_tensors(self, start_offs: int, fields: object) -> None:
            self.tensors = []

        def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[object]]:
            return offs, []

    theirs = KeysOnly(shipped_model)
    with GGUFFile.open(shipped_model) as ours:
        compared = 0
        for name, item in ours.metadata.items():
            expected = theirs.fields[name].contents()
            assert (item.tolist() if isinstance(item, np.ndarray) else item) == expected, name
            compared += 1
        assert compared == len(ours.metadata) > 15
