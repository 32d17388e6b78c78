"""Which engines are found, and what is said of those that cannot be used."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from crossval.bitnet_cpp.builder import built_library_path
from crossval.bitnet_cpp.manifest import combined_digest
from crossval.bitnet_cpp.remedies import LIBRARY_VARIABLE
from crossval.engines import available, llama_package, registry
from crossval.engines.available import Available
from crossval.errors import UnavailableError

FACTS = {"generation": "main", "simd_width": 16, "fused_quantizer": False, "binary16_sums": True}


@pytest.fixture(autouse=True)
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossval.bitnet_cpp.library.default_build_dir", lambda: tmp_path / "build")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that BITNET_CPP_LIB names and that behaves like one of bitnet.cpp's."""
    path = tmp_path / "libllama.so"
    path.write_bytes(b"")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    facts: dict[str, Any] = {**FACTS, "files": {str(path): "1" * 64}}
    monkeypatch.setattr("crossval.bitnet_cpp.runner.open_library", lambda _: facts)
    return path


def only(word: str) -> Available:
    (found,) = (one for one in available.collect() if one.word == word)
    return found


def test_every_engine_of_the_registry_is_listed(no_bitnet_cpp: None) -> None:
    listed = [one.word for one in available.collect()]
    assert sorted(set(listed)) == sorted(row.word for row in registry.ENGINES)


def test_our_engine_says_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = only("bitnet_py")
    assert found.ok
    assert "scalar" in str(found.detail)
    monkeypatch.setattr("bitnet_py._native.kernel_families", list)
    assert "no kernel family" in str(only("bitnet_py").why_not)


def test_a_build_is_known_by_its_behaviour_and_digest(library: Path) -> None:
    found = only("bitnet.cpp")
    assert (found.ok, found.where, found.detail) == (True, str(library), LIBRARY_VARIABLE)
    assert found.library_digest == combined_digest({str(library): "1" * 64})
    assert found.numerics is not None
    assert found.numerics.words() == ["main", "16 lanes", "sums in binary16"]
    assert (found.compiler, found.source_commit) == (None, None)  # no manifest lists this file


def test_builds_kept_side_by_side_are_listed_with_the_word_that_names_them(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = tmp_path / "builds"
    monkeypatch.setattr("crossval.bitnet_cpp.library.default_build_dir", lambda: builds)
    folders = [builds, builds / "main", builds / "sources" / "0123"]
    for folder in folders:
        built_library_path(folder).parent.mkdir(parents=True)
        built_library_path(folder).write_bytes(b"")
    found = [one for one in available.collect() if one.what == "real bitnet.cpp"]
    assert [one.word for one in found] == ["bitnet.cpp", *(f"bitnet.cpp:{folder}" for folder in folders)]
    monkeypatch.delenv(LIBRARY_VARIABLE)
    found = [one for one in available.collect() if one.what == "real bitnet.cpp"]
    assert [one.word for one in found] == ["bitnet.cpp", *(f"bitnet.cpp:{folder}" for folder in folders[1:])]


def test_what_cannot_be_used_says_why(library: Path, monkeypatch: pytest.MonkeyPatch, no_bitnet_cpp: None) -> None:
    assert "make fetch-cpp" in str(only("bitnet.cpp").why_not)
    monkeypatch.setattr(llama_package, "find_library", lambda: None)
    assert "pip install 'bitnet-parity[llama]'" in str(only("llama.cpp").why_not)

    def refused(path: Path) -> None:
        raise UnavailableError(f"{path}\n is of no known generation")

    monkeypatch.setattr("crossval.bitnet_cpp.runner.open_library", refused)
    monkeypatch.setattr(llama_package, "find_library", lambda: library)
    found = only("llama.cpp")
    assert (found.ok, found.why_not) == (False, f"{library} is of no known generation")


def test_a_setting_that_is_wrong_is_a_line_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "/no/such/file.so")
    assert "no such file" in str(only("bitnet.cpp").why_not)


def test_the_installed_package_is_examined_as_llama_cpp(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_package, "find_library", lambda: library)
    monkeypatch.setattr(llama_package, "version", lambda: "1.2.3")
    found = only("llama.cpp")
    assert (found.ok, found.version, found.detail) == (True, "1.2.3", "llama-cpp-python")


def test_recordings_are_listed_by_build(no_bitnet_cpp: None) -> None:
    found = [one for one in available.collect() if one.word == "auto"]
    assert all(one.ok and one.recorded for one in found)
    march = [one for one in found if one.numerics is not None and one.numerics.generation == "march"]
    assert ["10 recorded prompts" in str(one.detail) for one in march] == [True]


def test_a_row_is_plain_json(library: Path) -> None:
    row = only("bitnet.cpp").to_json()
    assert row["ok"] is True
    assert row["numerics"] == FACTS


@pytest.mark.parametrize("missing", ["torch", "transformers", None])
def test_transformers_needs_pytorch(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == missing:
            raise importlib.metadata.PackageNotFoundError(package)
        return f"{package} 1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    (found,) = available.hugging_face()
    if missing is None:
        assert (found.ok, found.version) == (True, "transformers 1.2")
        assert "torch 1.2" in str(found.detail)
    else:
        assert found.why_not == f"{missing} is not installed: run `pip install 'bitnet-parity[hf]'`"
