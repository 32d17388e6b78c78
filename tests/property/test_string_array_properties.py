"""The strings of a file are found exactly as by a plain walk over their lengths, whatever the bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_py import string_array
from bitnet_py.errors import ModelError
from bitnet_py.string_array import StringArray, find_strings, walk_strings
from tests.support.gguf_bytes import string

LENGTHS = (0, 1, 7, 8, 255, 257, *(1 << n for n in (8, 16, 31, 32, 40, 48, 56, 63)), (1 << 64) - 8, (1 << 64) - 1)

# What makes links break or lead astray: zero bytes, texts that look like lengths, lengths of more than one byte.
texts = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["", "\0", "\0" * 7, "\0" * 8, "\0" * 20, "\1" + "\0" * 7, "a\2" + "\0" * 7 + "b", "\0" * 7 + "z"]
    ),
    st.sampled_from([255, 256, 257, 300]).map("x".__mul__),
    st.integers(250, 260).map("\0".__mul__),
)
arrays = st.lists(texts, max_size=60)
knobs = st.tuples(st.sampled_from([8, 40, 200, 1 << 16]), st.sampled_from([1, 3, 16]))


def reference(buffer: bytes, start: int, count: int, limit: int) -> list[int]:
    """Return where strings begin and the last one ends, up to the first whose length is wrong."""
    offsets = [start]
    while len(offsets) <= count and start + 8 <= len(buffer):
        length = int.from_bytes(buffer[start : start + 8], "little")
        start += 8 + length
        if length > limit or start > len(buffer):
            break
        offsets.append(start)
    return offsets


@contextmanager
def blocks(n_bytes: int, n_walked: int) -> Iterator[None]:
    """Look at small blocks, so that small files have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(string_array, "_BLOCK_BYTES", n_bytes)
        patch.setattr(string_array, "_N_WALKED", n_walked)
        yield


def array_of(words: list[str], before: bytes = b"") -> StringArray:
    buffer = before + b"".join(map(string, words))
    return StringArray(buffer, find_strings(buffer, len(before), len(words)), "some.gguf", "key 'k'")


@given(words=arrays, before=st.binary(max_size=9), after=arrays, knobs=knobs)
@example(words=["a"] * 50, before=b"", after=[""] * 5, knobs=(1 << 16, 1))
@example(words=["a"] * 50, before=b"", after=["a"] * 50, knobs=(1 << 16, 1))
@settings(deadline=None)
def test_all_are_found(words: list[str], before: bytes, after: list[str], knobs: tuple[int, int]) -> None:
    buffer = before + b"".join(map(string, words + after))
    expected = reference(buffer, len(before), len(words), 1 << 26)
    assert len(expected) == len(words) + 1
    assert walk_strings(buffer, len(before), len(words)) == expected
    with blocks(*knobs):
        found = find_strings(buffer, len(before), len(words))
    assert found.dtype == np.int64
    assert found.tolist() == expected


@given(words=st.lists(texts, min_size=1, max_size=24), knobs=knobs)
@settings(max_examples=50, deadline=None)
def test_every_truncation_is_noticed(words: list[str], knobs: tuple[int, int]) -> None:
    whole = b"".join(map(string, words))
    with blocks(*knobs):
        for size in range(1, len(whole)):
            expected = reference(whole[:size], 0, len(words), 1 << 26)
            assert len(expected) <= len(words)
            assert find_strings(whole[:size], 0, len(words)).tolist() == expected
            assert walk_strings(whole[:size], 0, len(words)) == expected


@given(
    words=st.lists(texts, min_size=1, max_size=60),
    at=st.integers(0, 59),
    length=st.sampled_from(LENGTHS),
    is_added=st.booleans(),
    knobs=knobs,
)
@example(words=["a"] * 50, at=30, length=1 << 56, is_added=True, knobs=(1 << 16, 1))
@settings(deadline=None)
def test_hostile_lengths(words: list[str], at: int, length: int, is_added: bool, knobs: tuple[int, int]) -> None:
    """One length is false; an added one leaves the low bytes unchanged."""
    at %= len(words)
    parts = list(map(string, words))
    lie = (length + is_added * int.from_bytes(parts[at][:8], "little")) % (1 << 64)
    parts[at] = struct.pack("<Q", lie) + parts[at][8:]
    buffer = b"".join(parts)
    expected = reference(buffer, 0, len(words), 1 << 26)
    with blocks(*knobs):
        assert find_strings(buffer, 0, len(words)).tolist() == expected
    assert walk_strings(buffer, 0, len(words)) == expected


@given(data=st.lists(st.sampled_from([*[0] * 9, 1, 2, 8]), min_size=1, max_size=400), knobs=knobs)
@settings(max_examples=200, deadline=None)
def test_bytes_that_could_be_lengths_anywhere(data: list[int], knobs: tuple[int, int]) -> None:
    buffer = bytes(data)
    with blocks(*knobs):
        assert find_strings(buffer, 0, 50).tolist() == reference(buffer, 0, 50, 1 << 26)


@pytest.mark.parametrize("limit", [0, 5, 255, 256, 1000])
def test_longer_than_the_limit(limit: int) -> None:
    buffer = b"".join(string("x" * n) for n in (0, 1, limit, limit + 1, 0))
    expected = reference(buffer, 0, 5, limit)
    assert walk_strings(buffer, 0, 5, limit) == expected
    assert len(expected) <= 4


@given(words=arrays, before=st.binary(max_size=9))
@example(words=["\u0120" * 128, "\u0120the", "", "\U0001f600"], before=b"")
@settings(deadline=None)
def test_what_was_written_is_decoded(words: list[str], before: bytes) -> None:
    array = array_of(words, before)
    assert len(array) == len(words)
    assert array.tolist() == list(array) == words == array
    assert [array[i] for i in range(len(array))] == words
    assert array[1:-1:2] == words[1:-1:2]


@given(
    words=st.lists(texts, min_size=1, max_size=40), at=st.integers(0, 39), bad=st.sampled_from(["c3", "ff", "80"])
)
@settings(deadline=None)
def test_the_first_string_that_is_not_utf8_is_named(words: list[str], at: int, bad: str) -> None:
    """C3 is half a character: with the string after it, it may be a whole one."""
    at %= len(words)
    parts = [string(word) for word in words]
    parts[at] = string(words[at].encode() + bytes.fromhex(bad))
    parts.append(string(b"\xa9 is the other half, and wrong alone"))
    place = sum(map(len, parts[:at])) + 8
    buffer = b"".join(parts)
    array = StringArray(buffer, find_strings(buffer, 0, len(parts)), "some.gguf", "key 'k'")
    assert [array[i] for i in range(len(words)) if i != at] == words[:at] + words[at + 1 :]
    for look in (array.tolist, lambda: array[at], lambda: "nowhere" in array, lambda: array == [""] * len(array)):
        with pytest.raises(
            ModelError, match=rf"some\.gguf: key 'k', string {at} \(byte {place}\): expected UTF-8"
        ):
            look()
    assert repr(array).startswith(f"<{len(array)} strings: ")
