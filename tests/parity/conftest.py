"""The real bitnet.cpp for the live tests, or one visible line about what is missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path

import pytest

from crossval.bitnet_cpp import builder
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.library import build_dir_of, built_library_path, find_library
from crossval.bitnet_cpp.remedies import GENERATION_VARIABLE, HOW_TO_GET, LIBRARY_VARIABLE, SOURCE_VARIABLE
from crossval.bitnet_cpp.runner import open_library
from crossval.engines import llama_package
from crossval.passes import Generation

MAIN_LIBRARY_VARIABLE = "BITNET_CPP_MAIN_LIB"
"""A library of bitnet.cpp's main, where ``BITNET_CPP_LIB`` is another: tests want both."""

MISSING = f"real bitnet.cpp is missing: {HOW_TO_GET}"
MISSING_MAIN = (
    f"real bitnet.cpp main is missing: run `{GENERATION_VARIABLE}=main make fetch-cpp`, or set "
    f"{MAIN_LIBRARY_VARIABLE}=<path of its libllama.so>"
)
LLAMA_VARIABLE = "LLAMA_CPP_LIB"
"""A library of mainline llama.cpp, where the package is not installed."""
MISSING_LLAMA = (
    f"llama.cpp is missing: pip install 'bitnet-parity[llama]', or set {LLAMA_VARIABLE}=<path of its libllama.so>"
)
MISSING_CHECKOUT = f"llama.cpp's vocabulary tests are missing: set {SOURCE_VARIABLE}=<checkout of bitnet.cpp>"
MISSING_MARCH = f"{LIBRARY_VARIABLE} is no bitnet.cpp of March 2026, which this test needs"


@pytest.fixture(scope="session")
def bitnet_cpp_library() -> Path:
    """Path of a real libllama of bitnet.cpp; with only BITNET_CPP_DIR set it is built first, once."""
    library = find_library()
    if library is not None:
        return library.path
    source = os.environ.get(SOURCE_VARIABLE)
    if not source:
        pytest.skip(MISSING)
    described = cpp_source.describe(Path(source).resolve(), "directory")
    return builder.build(described, builder.Options(build_dir_of(described.generation))).path


@lru_cache
def generation_of(library: Path) -> Generation:
    """Return the generation of a library, as the harness finds it."""
    found: Generation = open_library(library)["generation"]
    return found


@pytest.fixture(scope="session")
def march_library(bitnet_cpp_library: Path) -> Path:
    """Path of a libllama of March 2026."""
    if generation_of(bitnet_cpp_library) != "march":
        pytest.skip(MISSING_MARCH)
    return bitnet_cpp_library


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Path of a libllama of mainline llama.cpp."""
    configured = os.environ.get(LLAMA_VARIABLE)
    installed = Path(configured) if configured else llama_package.find_library()
    if installed is None:
        pytest.skip(MISSING_LLAMA)
    return installed


@pytest.fixture(scope="session")
def main_library() -> Path:
    """Path of a libllama of main since July 2026."""
    names = (MAIN_LIBRARY_VARIABLE, LIBRARY_VARIABLE)
    configured = (Path(os.environ[name]) for name in names if os.environ.get(name))
    for path in (*configured, built_library_path(build_dir_of("main"))):
        if path.is_file() and generation_of(path) == "main":
            return path
    pytest.skip(MISSING_MAIN)


@pytest.fixture
def use_bitnet_cpp(bitnet_cpp_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands find the real library."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(bitnet_cpp_library))


@pytest.fixture(scope="session")
def golden(shipped_model: Path) -> Path:
    """bitnet.cpp's own trace of every tap, of the prompt "What is 2+2?"."""
    return shipped_model.with_suffix(".goldens") / "what-is-2-2"


@pytest.fixture(scope="session")
def short_golden(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of the prompt and the first four decoded tokens: what `crossval layers` compares."""
    folder = tmp_path_factory.mktemp("golden") / golden.name
    folder.mkdir()
    trace = json.loads((golden / "trace.json").read_text())
    trace["passes"] = trace["passes"][:5]
    for one in trace["passes"]:
        shutil.copy(golden / one["file"], folder)
    (folder / "trace.json").write_text(json.dumps(trace))
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give all skips without a library one location, so that the summary folds them into a line each."""
    report = yield
    reasons = (MISSING, MISSING_MAIN, MISSING_MARCH, MISSING_CHECKOUT)
    if report.skipped and isinstance(report.longrepr, tuple) and any(r in report.longrepr[2] for r in reasons):
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report
