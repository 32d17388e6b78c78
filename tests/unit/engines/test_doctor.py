"""The doctor names what is missing and what to do, whatever state the machine is in."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from bitnet_py import _native
from bitnet_py.errors import ModelError, NativeError
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.remedies import LIBRARY_VARIABLE, SOURCE_VARIABLE
from crossval.engines import doctor
from crossval.engines.doctor import PartCheck
from crossval.errors import UnavailableError
from tests.support.bitnet_cpp_tree import write_tree


@pytest.fixture(autouse=True)
def no_bitnet_cpp(tmp_path, monkeypatch):
    """No library, no source: each test adds what it needs."""
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.delenv(SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path / "build")
    monkeypatch.setattr(cpp_library, "repository_root", lambda: tmp_path)


def only(checks: list[PartCheck]) -> PartCheck:
    assert len(checks) == 1
    return checks[0]


def test_every_part_is_looked_at_and_every_failure_has_a_remedy():
    checks = doctor.collect()
    names = " ".join(check.name for check in checks)
    for part in (
        "numpy",
        "C library",
        "kernels",
        "model",
        "goldens",
        "compiler",
        "git",
        "source",
        "bitnet.cpp library",
    ):
        assert part in names
    assert all(check.ok or check.remedy for check in checks)
    assert all(check.detail for check in checks)


def test_what_the_project_itself_needs_is_here():
    assert [check for check in doctor.collect() if check.required and not check.ok] == []


def test_the_goldens_are_a_reference():
    check = only(doctor.check_goldens())
    assert (check.ok, check.reference) == (True, True)


def test_a_missing_package_is_named(monkeypatch):
    def version(package: str) -> str:
        if package == "rich":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    failing = [check for check in doctor.check_packages() if not check.ok]
    assert [(check.name, check.remedy) for check in failing] == [("python package rich", "pip install rich")]


def test_a_missing_c_library_is_no_traceback(monkeypatch):
    def fail() -> Path:
        raise NativeError("it is not installed")

    monkeypatch.setattr(_native, "library_path", fail)
    monkeypatch.setattr(_native, "kernel_families", fail)
    for check in (only(doctor.check_c_library()), only(doctor.check_kernels())):
        assert (check.ok, check.detail) == (False, "it is not installed")


def test_a_missing_default_model_is_no_traceback(monkeypatch):
    def fail() -> Path:
        raise ModelError("no model here")

    monkeypatch.setattr("bitnet_py.resources.default_model_path", fail)
    assert "no model here" in only(doctor.check_default_model()).detail
    assert "no model here" in only(doctor.check_goldens()).detail


def test_a_missing_compiler_does_not_stop_anything_else(monkeypatch):
    def fail() -> None:
        raise UnavailableError("no compiler")

    monkeypatch.setattr(cpp_toolchain, "find_toolchain", fail)
    check = only(doctor.check_toolchain())
    assert (check.ok, check.required, check.detail) == (False, False, "no compiler")


def test_a_missing_git_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in only(doctor.check_git()).detail


def test_the_states_of_the_source_are_told_apart(tmp_path, monkeypatch):
    submodule = tmp_path / cpp_source.SUBMODULE
    assert "is not initialised" in only(doctor.check_submodule()).detail
    submodule.mkdir(parents=True)
    assert "is not initialised" in only(doctor.check_submodule()).detail
    (submodule / "CMakeLists.txt").touch()
    assert "lacks 3rdparty/llama.cpp/src/llama.cpp" in only(doctor.check_submodule()).detail

    configured = write_tree(tmp_path / "checkout")
    monkeypatch.setenv(SOURCE_VARIABLE, str(configured))
    check = only(doctor.check_submodule())
    assert check.ok
    assert "BITNET_CPP_DIR" in check.detail
    monkeypatch.setattr(cpp_library, "repository_root", lambda: None)
    monkeypatch.delenv(SOURCE_VARIABLE)
    assert "not a git checkout" in only(doctor.check_submodule()).detail


def test_another_commit_than_the_pinned_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_source, "check_layout", lambda _: None)
    monkeypatch.setattr(cpp_source, "git_commit", lambda _: "f" * 40)
    check = only(doctor.check_submodule())
    assert not check.ok
    assert f"is at {'f' * 40}, expected {cpp_source.PINNED_COMMIT}" in check.detail


def test_the_states_of_the_library_are_told_apart(tmp_path, monkeypatch):
    check = only(doctor.check_bitnet_cpp())
    assert (check.ok, check.detail, check.required) == (False, "not built", False)
    assert "make fetch-cpp" in check.remedy

    library = tmp_path / "libllama.so"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    assert "no such file" in only(doctor.check_bitnet_cpp()).detail
    library.write_text("not a library")
    assert "is not a shared library" in only(doctor.check_bitnet_cpp()).detail

    facts = {
        "files": {str(library): "1"},
        "generation": "march",
        "simd_width": 8,
        "fused_quantizer": False,
        "binary16_sums": False,
    }
    monkeypatch.setattr("crossval.bitnet_cpp.runner.open_library", lambda _: facts)
    check = only(doctor.check_bitnet_cpp())
    assert (check.ok, check.reference) == (True, True)
    assert "no build manifest" in check.detail
    facts["simd_width"] = None
    assert "no known build" in only(doctor.check_bitnet_cpp()).remedy


def test_a_check_that_breaks_is_a_finding_itself(monkeypatch):
    def check_git() -> list[PartCheck]:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "check_git", check_git)
    broken = [check for check in doctor.collect() if "boom" in check.detail]
    assert [(check.name, check.ok) for check in broken] == [("git", False)]


def test_another_libm_is_reported_with_what_to_expect(monkeypatch):
    from bitnet_py import _native

    assert [check.ok for check in doctor.check_libm()] == [True]
    monkeypatch.setattr(_native, "libm_name", lambda: None)
    (check,) = doctor.check_libm()
    assert not check.ok
    assert not check.required
    assert "live bitnet.cpp" in check.remedy
