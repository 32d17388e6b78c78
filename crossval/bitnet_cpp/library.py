"""Where a shared library is: the one configured, the ones built here, or the one that a path leads to."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import get_args

from crossval.bitnet_cpp import builder
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.builder import FoundLibrary, Options, built_library_path
from crossval.bitnet_cpp.manifest import LIBRARY_NAME, read_manifest
from crossval.bitnet_cpp.remedies import (
    BUILD_DIR_VARIABLE,
    GENERATION_VARIABLE,
    HOW_TO_GET,
    LIBRARY_VARIABLE,
    STILL_WORKS,
)
from crossval.errors import BadInputError, UnavailableError
from crossval.terms import Generation

PREFERENCE: tuple[Generation, ...] = ("march", "main")
"""Which of the libraries built here is used when none is asked for."""

IN_BUILD_DIRECTORY = ("lib", "bin", "src", ".", "3rdparty/llama.cpp/src", "llama_cpp/lib")
"""Where builds put their libraries: ours, CMake of either generation, an installed Python package."""

_ELF_MACHINES = {3: "i386", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_ELF_SHARED = 3


def repository_root() -> Path | None:
    """Return the top of the project's checkout, or None when the package is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "crossval").is_dir() else None


def default_build_dir() -> Path:
    """Return where libraries are built: ``BITNET_CPP_BUILD_DIR``, or in the checkout, or in the user's cache."""
    configured = os.environ.get(BUILD_DIR_VARIABLE)
    if configured:
        return Path(configured).expanduser().resolve()
    root = repository_root()
    if root is not None:
        return root / "build" / "bitnet.cpp"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "bitnet-parity" / "bitnet.cpp"


def build_dir_of(generation: Generation) -> Path:
    """Return where ``make fetch-cpp`` builds a generation: the pinned one at the top, others beside it."""
    return default_build_dir() if generation == PREFERENCE[0] else default_build_dir() / generation


def asked_generation() -> Generation | None:
    """Return the generation that ``BITNET_CPP_GENERATION`` names.

    Raises:
        BadInputError: it names none.
    """
    name = os.environ.get(GENERATION_VARIABLE)
    for generation in get_args(Generation):
        if name == generation:
            return generation  # type: ignore[no-any-return]  # typing does not know the arguments of a Literal
    if name:
        raise BadInputError(f"{GENERATION_VARIABLE}={name}: expected {' or '.join(get_args(Generation))}")
    return None


def find_library() -> FoundLibrary | None:
    """Return the library to use, None when there is none.

    ``BITNET_CPP_LIB`` first; then the one that ``make fetch-cpp`` built of the generation that
    ``BITNET_CPP_GENERATION`` names, or of the first in ``PREFERENCE`` that is there.

    Raises:
        UnavailableError: ``BITNET_CPP_LIB`` names no file; falling back to another library would
        hide that.
        BadInputError: ``BITNET_CPP_GENERATION`` names no generation.
    """
    configured = os.environ.get(LIBRARY_VARIABLE)
    if configured:
        path = Path(configured).expanduser()
        if not path.is_file():
            raise UnavailableError(f"{LIBRARY_VARIABLE}={configured}: no such file; expected a {LIBRARY_NAME}")
        return FoundLibrary(path.resolve(), LIBRARY_VARIABLE, read_manifest(path.resolve().parent))
    asked = asked_generation()
    for generation in PREFERENCE if asked is None else (asked,):
        path = built_library_path(build_dir_of(generation))
        if path.is_file():
            return FoundLibrary(path, "build", read_manifest(path.parent))
    return None


def variables_in_use() -> tuple[str, ...]:
    """Return the names of the variables on which it depends what ``find_library`` finds now."""
    if os.environ.get(LIBRARY_VARIABLE):
        return (LIBRARY_VARIABLE,)
    built = any(built_library_path(build_dir_of(generation)).is_file() for generation in get_args(Generation))
    return (BUILD_DIR_VARIABLE, GENERATION_VARIABLE) if built else ()


def require_library() -> FoundLibrary:
    """Return ``find_library()``.

    Raises:
        UnavailableError: there is none; the message says how to get one and what works without it.
    """
    library = find_library()
    if library is None:
        raise UnavailableError(f"bitnet.cpp is not built: {HOW_TO_GET}; {STILL_WORKS}")
    return library


def resolve(path: str | None) -> FoundLibrary:
    """Return the library that a path leads to; None: ``require_library()``.

    A file is the library itself, in a build directory it is looked for, and a source checkout is
    built, out of tree and once per state of its sources and options.

    Raises:
        BadInputError: there is nothing of the kind, or a file that cannot be a library here.
        UnavailableError: the checkout cannot be built.
    """
    if path is None:
        return require_library()
    place = Path(path).expanduser()
    if place.is_dir():
        return _in_directory(place.resolve())
    if not place.exists():
        raise BadInputError(
            f"{path}: no such file or directory; expected a {LIBRARY_NAME}, a build directory or a source checkout"
        )
    check_shared_object(place)
    return FoundLibrary(place.resolve(), "path", read_manifest(place.resolve().parent))


def _in_directory(directory: Path) -> FoundLibrary:
    if cpp_source.looks_like_checkout(directory):
        source = cpp_source.describe(directory, "directory")
        return replace(builder.build(source, Options(_cache_dir(source.digest))), origin="source")
    for name in IN_BUILD_DIRECTORY:
        # The plain name first: versioned ones are links' targets.
        found = sorted((directory / name).glob(f"{LIBRARY_NAME}*"))
        if found:
            check_shared_object(found[0])
            return FoundLibrary(found[0], "path", read_manifest(found[0].parent))
    raise BadInputError(
        f"{directory} holds neither a {LIBRARY_NAME} (looked in {', '.join(IN_BUILD_DIRECTORY)}) nor a source "
        "checkout of bitnet.cpp or llama.cpp"
    )


def _cache_dir(digest: str) -> Path:
    return default_build_dir() / "sources" / digest[:16]


def check_shared_object(path: Path) -> None:
    """Check that a file is a shared library for this machine.

    Raises:
        BadInputError: it is not, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise BadInputError(f"cannot read the library {path}: {error.strerror or error}") from error
    if header[:4] != b"\x7fELF" or len(header) < 20:
        raise BadInputError(
            f"{path} is not a shared library: it starts with {header[:8]!r}, expected an ELF header"
        )
    if header[4] != 2:
        raise BadInputError(f"{path} is a 32-bit library; this is a 64-bit program")
    kind, machine = (int.from_bytes(header[at : at + 2], "little") for at in (16, 18))
    name = _ELF_MACHINES.get(machine, f"ELF machine {machine}")
    if name != platform.machine():
        raise BadInputError(f"{path} is a library for {name}; this machine is {platform.machine()}")
    if kind != _ELF_SHARED:
        raise BadInputError(f"{path} is no shared library but another kind of ELF file (type {kind})")
