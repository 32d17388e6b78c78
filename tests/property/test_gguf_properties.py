"""Whatever the bytes, opening and loading a model either works or raises ``ModelError``."""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.string_array import StringArray
from bitnet_py.weights import Weights
from tests.support.gguf_bytes import Container, Tensor, model_container, small_container, string

SMALL = small_container().to_bytes()
MODEL = model_container().to_bytes()
MODEL_HEADER_BYTES = MODEL.index(string("output_norm.weight")) + 64
INTERESTING = (0, 1, 2, 3, 36, 0x7F, 0xFF, (1 << 31) - 1, *(1 << n for n in (31, 32, 40, 62, 63)), (1 << 64) - 1)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "fuzzed.gguf"


def outcome(path: Path, data: bytes) -> str:
    """Return ``ok`` or ``refused``; any other exception is a failed test."""
    path.write_bytes(data)
    try:
        with GGUFFile.open(path) as gguf:
            for name in gguf.tensors:
                assert gguf.data(name).size == gguf.tensors[name].size_bytes
            for value in gguf.metadata.values():
                if isinstance(value, StringArray):
                    assert len(value.tolist()) == len(value)
            Weights.load(gguf).check_finite()
    except ModelError as error:
        message = str(error)
        assert message.isprintable()
        assert str(path) in message
        assert len(message) < 600 + len(str(path))
        return "refused"
    return "ok"


def mutate(data: bytes, limit: int, choices: random.Random, rounds: int) -> bytes:
    out = bytearray(data)
    for _ in range(rounds):
        at = choices.randrange(min(limit, len(out)))
        kind = choices.randrange(5)
        if kind == 0:
            out[at] ^= 1 << choices.randrange(8)
        elif kind == 1:
            out[at] = choices.randrange(256)
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", choices.choice(INTERESTING))
        elif kind == 3:
            out[at : at + 4] = struct.pack("<I", choices.choice(INTERESTING) & 0xFFFFFFFF)
        else:
            del out[at : at + choices.randrange(1, 9)]
    return bytes(out)


@given(choices=st.randoms(use_true_random=False), rounds=st.integers(1, 4))
@settings(max_examples=250, deadline=None)
def test_mutated_containers(scratch: Path, choices: random.Random, rounds: int) -> None:
    outcome(scratch, mutate(SMALL, len(SMALL), choices, rounds))


@given(choices=st.randoms(use_true_random=False), rounds=st.integers(1, 3))
@settings(max_examples=250, deadline=None)
def test_mutated_model_headers(scratch: Path, choices: random.Random, rounds: int) -> None:
    outcome(scratch, mutate(MODEL, MODEL_HEADER_BYTES, choices, rounds))


def test_every_single_byte_of_the_header(scratch: Path) -> None:
    """All bits of one byte flipped, at every position of the small container."""
    seen = set()
    for at in range(len(SMALL)):
        data = bytearray(SMALL)
        data[at] ^= 0xFF
        seen.add(outcome(scratch, bytes(data)))
    assert seen == {"refused"}  # even intact, it is not a whole model


def test_the_unbroken_model_is_accepted(scratch: Path) -> None:
    assert outcome(scratch, MODEL) == "ok"


@given(data=st.binary(max_size=400))
@example(data=b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
@settings(deadline=None)
def test_arbitrary_bytes_behind_a_valid_start(scratch: Path, data: bytes) -> None:
    assert outcome(scratch, data) == "refused"
    assert outcome(scratch, b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + data) == "refused"


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(
    entries=st.dictionaries(
        st.text(min_size=1, max_size=16), st.tuples(shapes, st.binary(min_size=1)), max_size=6
    ),
    words=st.lists(st.text(max_size=20), max_size=20),
    alignment=st.sampled_from([8, 32, 128]),
)
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read(
    scratch: Path, entries: dict[str, tuple[tuple[int, ...], bytes]], words: list[str], alignment: int
) -> None:
    container = Container(
        keys=[("general.alignment", 4, alignment), ("words", 9, (8, words))],
        tensors=[
            Tensor(name, shape, 24, (seed * 625)[: _count(shape)]) for name, (shape, seed) in entries.items()
        ],
        alignment=alignment,
    )
    scratch.write_bytes(container.to_bytes())
    with GGUFFile.open(scratch) as gguf:
        assert gguf.metadata["words"] == words
        assert {name: info.shape for name, info in gguf.tensors.items()} == {n: s for n, (s, _) in entries.items()}
        for name, (shape, seed) in entries.items():
            assert gguf.data(name).tobytes() == (seed * 625)[: _count(shape)]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
