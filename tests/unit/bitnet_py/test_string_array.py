"""The strings of an array: a sequence that behaves like a list, as long as it is referenced."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_py import string_array
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.string_array import StringArray, find_strings
from tests.support.gguf_bytes import ARRAY, STRING, Container, string

WORDS = ["a", "", "\u0120the", "x" * 300, "\0", "b"]


def array_of(words: list[str]) -> StringArray:
    buffer = b"before" + b"".join(map(string, words)) + b"after"
    return StringArray(buffer, find_strings(buffer, 6, len(words)), "some.gguf", "key 'k'")


def test_reads_like_a_list() -> None:
    array = array_of(WORDS)
    assert len(array) == 6
    assert array[2] == array[-4] == "\u0120the"
    assert array[1:3] == WORDS[1:3]
    assert list(array) == list(reversed(array))[::-1] == array.tolist() == WORDS
    assert "b" in array
    assert "c" not in array
    assert array.index("\u0120the") == 2
    with pytest.raises(IndexError):
        array[6]


def test_equality() -> None:
    array, same = array_of(WORDS), list(WORDS)
    assert array == same
    assert same == array
    assert array == tuple(WORDS)
    assert array == array_of(WORDS)
    assert array != WORDS[:-1]
    assert array != [*WORDS[:-1], "c"]
    assert array_of(["a"]) != "a"
    assert array_of([]) == []
    with pytest.raises(TypeError, match="unhashable"):
        hash(array)


def test_nothing_changes_it() -> None:
    array = array_of(WORDS)
    with pytest.raises(TypeError):
        array[0] = "b"  # type: ignore[index]
    with pytest.raises(AttributeError):
        array.words = WORDS  # type: ignore[attr-defined]
    array.tolist()[0] = "b"
    assert array == WORDS


def test_repr_is_short_whatever_is_in_it() -> None:
    assert repr(array_of(["a", "\n"])) == r"<2 strings: 'a', '\n'>"
    text = repr(array_of(["x" * 1000] * 1000))
    assert text.startswith("<1000 strings: 'xxx")
    assert text.endswith("...>")
    assert len(text) < 300
    buffer = string(b"\xff")
    assert "\ufffd" in repr(StringArray(buffer, find_strings(buffer, 0, 1), "some.gguf", "key 'k'"))


def write(path: Path, words: list[str | bytes]) -> Path:
    path.write_bytes(Container(keys=[("words", ARRAY, (STRING, words))]).to_bytes())
    return path


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_holds_the_mapping_and_gives_it_back(tmp_path: Path) -> None:
    path = write(tmp_path / "words.gguf", WORDS)

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    with GGUFFile.open(path) as file:
        array = file.metadata["words"]
    del file
    assert is_mapped()
    assert array == WORDS
    del array
    assert not is_mapped()


@pytest.mark.parametrize("n", [3, 60])
def test_a_string_that_is_not_utf8_is_refused_when_it_is_looked_at(tmp_path: Path, n: int) -> None:
    path = write(tmp_path / "words.gguf", [*["a"] * (n - 1), b"b\xff", "c"])
    with GGUFFile.open(path) as file:
        words = file.metadata["words"]
        assert len(words) == n + 1
        assert words[n] == "c"
        with pytest.raises(ModelError) as caught:
            list(words)
    start = path.read_bytes().index(b"b\xff")
    assert str(caught.value) == (
        f"{path}: key 'words', string {n - 1} (byte {start}): expected UTF-8, found invalid start byte at its "
        "byte 1; the file is damaged: copy or download it again"
    )


@pytest.mark.parametrize("at", [3, 40])
def test_a_wrong_length_anywhere_in_the_array_is_refused_when_the_file_is_opened(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "words.gguf", [*["a"] * at, b"some word", *["a"] * 20])
    data = path.read_bytes()
    start = data.index(string("some word"))
    path.write_bytes(data.replace(string("some word"), b"\xff" * 8 + b"some word"))
    with pytest.raises(ModelError) as caught:
        GGUFFile.open(path)
    assert str(caught.value) == (
        f"{path}: key 'words', length of string {at} (byte {start}): expected at most {len(data) - start - 8} "
        f"bytes, found {(1 << 64) - 1}; the file is truncated or damaged: copy or download it again"
    )


def test_few_strings_of_a_vocabulary_are_handled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it fast; the longest token of Llama 3 is 256 bytes."""
    words = [f"\u0120{i}" for i in range(20_000)]
    words[10_000] = "\u0120" * 128
    walk, n_walked = string_array.walk_strings, 0

    def counted(buffer: bytes, start: int, count: int) -> list[int]:
        nonlocal n_walked
        n_walked += count
        return walk(buffer, start, count)

    monkeypatch.setattr(string_array, "walk_strings", counted)
    array = array_of(words)
    assert n_walked < 200
    monkeypatch.delattr(StringArray, "_decode")
    assert array.tolist() == words
