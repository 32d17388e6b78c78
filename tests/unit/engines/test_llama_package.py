"""Finding the library of ``llama-cpp-python`` without importing the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from crossval.engines import llama_package


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, first on the path."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "llama_cpp_python-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def test_the_library_is_found_without_importing_the_package(installed: Path) -> None:
    assert llama_package.version() == "9.8.7"
    assert llama_package.find_library() is None
    library = installed / "lib" / "libllama.so"
    library.parent.mkdir()
    library.write_bytes(b"")
    assert llama_package.find_library() == library
    assert "llama_cpp" not in sys.modules


def test_nothing_is_found_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert llama_package.version() is None
    assert llama_package.find_library() is None
