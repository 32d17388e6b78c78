"""The real bitnet.cpp for the live tests, or one visible line about what is missing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from crossval.bitnet_cpp import build as build_cpp
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.library import (
    HOW_TO_GET,
    LIBRARY_VARIABLE,
    SOURCE_VARIABLE,
    default_build_dir,
    find_library,
)

MISSING = f"real bitnet.cpp is missing: {HOW_TO_GET}"


@pytest.fixture(scope="session")
def bitnet_cpp_library() -> Path:
    """Path of a real libllama of bitnet.cpp; with only BITNET_CPP_DIR set it is built first, once."""
    library = find_library()
    if library is not None:
        return library.path
    source = os.environ.get(SOURCE_VARIABLE)
    if not source:
        pytest.skip(MISSING)
    build_dir = default_build_dir()
    build_dir.parent.mkdir(parents=True, exist_ok=True)
    # Several test workers, one build: the others wait and then find it up to date.
    with (build_dir.parent / "bitnet.cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        described = cpp_source.describe(Path(source).resolve(), "directory")
        return build_cpp.build(described, build_cpp.Options(build_dir)).path


@pytest.fixture
def use_bitnet_cpp(bitnet_cpp_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands find the real library."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(bitnet_cpp_library))


@pytest.fixture(scope="session")
def golden(shipped_model: Path) -> Path:
    """bitnet.cpp's own trace of every tap, of the prompt "What is 2+2?"."""
    return shipped_model.with_suffix(".goldens") / "what-is-2-2"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give all skips without bitnet.cpp one location, so that the summary folds them into one line."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and MISSING in report.longrepr[2]:
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report
