"""A stand-in for a checkout of bitnet.cpp, which git, CMake and the compiler accept as real."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.bitnet_cpp.remedies import GENERATION_VARIABLE, LIBRARY_VARIABLE, SOURCE_VARIABLE
from tests.support.bitnet_cpp_tree import write_tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "checkout")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (LIBRARY_VARIABLE, SOURCE_VARIABLE, GENERATION_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
