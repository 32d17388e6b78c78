"""The programs that build bitnet.cpp: a C and C++ compiler, CMake, Ninja or make."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from crossval.bitnet_cpp.remedies import STILL_WORKS
from crossval.errors import UnavailableError

COMPILERS = ("clang", *(f"clang-{version}" for version in range(22, 13, -1)), "gcc", "cc")
"""C compilers tried in this order; upstream builds with clang, gcc rounds the activation quantiser differently."""


@dataclass(frozen=True)
class Toolchain:
    """The programs of a build; ``version`` is the compiler's own first line."""

    cc: str
    cxx: str
    version: str
    cmake: str
    cmake_version: str
    generator: str


def find_toolchain(cc: str | None = None, cxx: str | None = None) -> Toolchain:
    """Return compiler, CMake and generator to use.

    Raises:
        UnavailableError: one of them is missing.
    """
    search = search_path()
    cmake = shutil.which("cmake", path=search)
    if cmake is None:
        raise UnavailableError(f"CMake is not installed (try `pip install cmake`); {STILL_WORKS}")
    for candidate in (cc,) if cc else COMPILERS:
        c_path = shutil.which(candidate)
        cxx_path = shutil.which(cxx or cxx_name(candidate))
        if c_path and cxx_path:
            generator = "Ninja" if shutil.which("ninja", path=search) else "Unix Makefiles"
            return Toolchain(
                c_path,
                cxx_path,
                _first_line(c_path, "--version"),
                cmake,
                _first_line(cmake, "--version"),
                generator,
            )
    wanted = f"{cc} with {cxx or cxx_name(cc)}" if cc else "clang or gcc with their C++ compilers"
    raise UnavailableError(f"no C and C++ compiler: looked for {wanted}; install one; {STILL_WORKS}")


def cxx_name(cc: str) -> str:
    """Return the C++ driver that belongs to a C driver: clang-19 -> clang++-19, gcc-12 -> g++-12, cc -> c++."""
    directory, name = os.path.split(cc)
    for c_driver, cxx_driver in (("clang", "clang++"), ("gcc", "g++"), ("cc", "c++")):
        if c_driver in name:
            return os.path.join(directory, name.replace(c_driver, cxx_driver, 1))
    return cc


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"cannot run {shlex.join(command)}: {error}") from error
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def search_path() -> str:
    """Return PATH with the interpreter's own directory, where pip puts ``cmake`` and ``ninja``."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
