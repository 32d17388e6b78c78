"""Which compilers are found, and the message when there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.bitnet_cpp import build as build_cpp
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.remedies import SOURCE_VARIABLE
from crossval.errors import UnavailableError
from tests.support.bitnet_cpp_tree import write_tree


@pytest.mark.parametrize(
    ("cc", "cxx"),
    [
        ("clang", "clang++"),
        ("clang-19", "clang++-19"),
        ("gcc", "g++"),
        ("/opt/gcc-13/bin/gcc-13", "/opt/gcc-13/bin/g++-13"),
        ("cc", "c++"),
        ("x86_64-linux-gnu-gcc-12", "x86_64-linux-gnu-g++-12"),
    ],
)
def test_the_cxx_compiler_belongs_to_the_c_compiler(cc, cxx):
    assert cpp_toolchain.cxx_name(cc) == cxx


def test_a_missing_compiler_says_what_still_works(tmp_path, monkeypatch, capsys):
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho cmake version 9\n")
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no C and C\+\+ compiler.*--reference spec"):
        cpp_toolchain.find_toolchain()
    monkeypatch.setenv(SOURCE_VARIABLE, str(write_tree(tmp_path / "checkout")))
    assert build_cpp.main(["--build-dir", str(tmp_path / "build")]) == 3
    assert "no C and C++ compiler" in capsys.readouterr().err


def test_clang_is_preferred_to_gcc(tmp_path, monkeypatch):
    for name in ("gcc", "g++", "clang-15", "clang++-15", "clang-18", "cmake"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} version\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = cpp_toolchain.find_toolchain()
    assert (Path(tools.cc).name, Path(tools.cxx).name) == ("clang-15", "clang++-15")
    assert tools.version == "clang-15 version"
    assert Path(cpp_toolchain.find_toolchain("gcc").cxx).name == "g++"
    with pytest.raises(UnavailableError, match=r"looked for clang-18 with clang\+\+-18"):
        cpp_toolchain.find_toolchain("clang-18")
