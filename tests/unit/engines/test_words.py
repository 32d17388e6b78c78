"""The grammar of engine words: the same on both sides, parsed in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.engines.registry import find_word
from crossval.engines.words import EngineWord
from crossval.errors import BadInputError
from crossval.terms import SIDES, Side


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("word", ["bitnet_py", "bitnet.cpp", "llama.cpp", "transformers", "spec"])
def test_a_name_is_a_word_on_both_sides(side: Side, word: str) -> None:
    assert find_word(side, word) == EngineWord(word, word)


@pytest.mark.parametrize("side", SIDES)
def test_a_path_follows_the_first_colon(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert find_word(side, "bitnet.cpp:a:b") == EngineWord("bitnet.cpp:a:b", "bitnet.cpp", "a:b")
    assert find_word(side, "llama.cpp:~/x").path == "/home/me/x"


def test_a_directory_is_a_trace_and_a_word_is_never_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("spec", "t"):
        (tmp_path / name).mkdir()
    assert find_word("candidate", "t") == EngineWord("t", "DIR", "t")
    assert find_word("candidate", "spec").path is None
    assert find_word("candidate", "./spec").name == "DIR"


def test_auto_is_a_word_of_the_reference_only() -> None:
    assert find_word("reference", "auto").name == "auto"
    with pytest.raises(BadInputError, match="candidate 'auto' is neither"):
        find_word("candidate", "auto")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("word", ["bitnet", "", "BITNET.CPP", "no/such/dir", "march:x", ":x"])
def test_unknown_words_are_refused_with_the_known_ones(word: str, side: Side) -> None:
    builds = r"bitnet_py, bitnet\.cpp\[:PATH\], llama\.cpp\[:PATH\], transformers\[:DTYPE\]"
    listed = rf"{builds}, spec nor a directory with a trace$"
    with pytest.raises(BadInputError, match=rf"^{side} '{word}' is neither (auto, )?{listed}"):
        find_word(side, word)


def test_what_is_wrong_with_a_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"spec takes no path"):
        find_word("candidate", "spec:x")
    with pytest.raises(BadInputError, match=r"expected bitnet\.cpp:PATH"):
        find_word("candidate", "bitnet.cpp:")
    library = tmp_path / "libllama.so"
    library.write_bytes(b"")
    with pytest.raises(BadInputError, match=rf"write bitnet\.cpp:{library} if it is a library"):
        find_word("candidate", str(library))


def test_a_plain_word_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").mkdir()
    plain = {
        "spec": "spec",
        "bitnet.cpp:/home/me/my-fork/": "bitnet.cpp:my-fork",
        "llama.cpp:.": f"llama.cpp:{tmp_path.name}",
        f"{tmp_path}/trace": "trace",
        "bitnet.cpp:/home/me/my-fork/build/bin/libllama.so.0": "bitnet.cpp:my-fork",
        "bitnet.cpp:/": "bitnet.cpp:",
    }
    for text, expected in plain.items():
        assert find_word("candidate", text).plain == expected
