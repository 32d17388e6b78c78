"""Where bitnet.cpp's shared library is, and the manifest that says how it was built.

The manifest is trusted only if the library's files have the digests it lists: identity comes from
the files that a process actually loaded, never from a file next to them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.errors import UnavailableError

LIBRARY_VARIABLE = "BITNET_CPP_LIB"
SOURCE_VARIABLE = "BITNET_CPP_DIR"
LIBRARY_NAME = "libllama.so"
MANIFEST_NAME = "bitnet_cpp_build.json"
MANIFEST_VERSION = 1

HOW_TO_GET = (
    f"run `make fetch-cpp` (downloads and builds it), or set {SOURCE_VARIABLE}=<bitnet.cpp checkout> and run it "
    f"(builds that, no network), or set {LIBRARY_VARIABLE}=<path of a ready libllama.so>"
)
STILL_WORKS = (
    "what works without it: recorded goldens (--reference TRACE_DIR), the specification (--reference spec), "
    "and the engine itself"
)


@dataclass(frozen=True)
class BuildManifest:
    """How a library was built; ``libraries`` maps file name -> sha256, ``data`` is the whole file."""

    source_commit: str | None
    source_digest: str
    compiler: str
    flags: str
    libraries: Mapping[str, str]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class BuiltLibrary:
    """A libllama on disk; ``origin`` states how it was found."""

    path: Path
    origin: str
    manifest: BuildManifest | None


def repository_root() -> Path | None:
    """Return the top of the project's checkout, or None when the package is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "crossval").is_dir() else None


def default_build_dir() -> Path:
    """Return where bitnet.cpp is built: ``build/bitnet.cpp`` of the checkout, else the user's cache."""
    root = repository_root()
    if root is not None:
        return root / "build" / "bitnet.cpp"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "bitnet-parity" / "bitnet.cpp"


def built_library_path(build_dir: Path) -> Path:
    """Return the path at which a build places its libllama."""
    return build_dir / "lib" / LIBRARY_NAME


def find_library() -> BuiltLibrary | None:
    """Return the library to use: ``BITNET_CPP_LIB`` first, then the built one; None when there is neither.

    Raises:
        UnavailableError: ``BITNET_CPP_LIB`` names no file; falling back to another library would
        hide that.
    """
    configured = os.environ.get(LIBRARY_VARIABLE)
    if configured:
        path = Path(configured).expanduser()
        if not path.is_file():
            raise UnavailableError(f"{LIBRARY_VARIABLE}={configured}: no such file; expected a libllama.so")
        return BuiltLibrary(path.resolve(), LIBRARY_VARIABLE, read_manifest(path.resolve().parent))
    path = built_library_path(default_build_dir())
    if path.is_file():
        return BuiltLibrary(path, "build", read_manifest(path.parent))
    return None


def require_library() -> BuiltLibrary:
    """Return ``find_library()``.

    Raises:
        UnavailableError: there is none; the message says how to get one and what works without it.
    """
    library = find_library()
    if library is None:
        raise UnavailableError(f"bitnet.cpp is not built: {HOW_TO_GET}; {STILL_WORKS}")
    return library


def resolve(path: str | None) -> BuiltLibrary:
    """Return the library that a path names; None: ``require_library()``.

    Raises:
        UnavailableError: there is none.
    """
    if path is None:
        return require_library()
    file = Path(path).expanduser()
    if not file.is_file():
        raise UnavailableError(f"{path}: no such file; expected a libllama.so")
    return BuiltLibrary(file.resolve(), path, read_manifest(file.resolve().parent))


def read_manifest(directory: Path) -> BuildManifest | None:
    """Return the manifest in a directory, or None when there is none of this version."""
    try:
        data = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        if data["version"] != MANIFEST_VERSION:
            return None
        compiler, flags = data["compiler"]["version"], data["cmake"]["flags"]
        libraries = {str(name): str(digest) for name, digest in data["libraries"].items()}
        commit, digest = data["source"]["commit"], data["source"]["digest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not all(isinstance(text, str) for text in (compiler, flags, digest)) or not isinstance(commit, str | None):
        return None
    return BuildManifest(commit, digest, compiler, flags, libraries, data)


def manifest_for(files: Mapping[str, str]) -> BuildManifest | None:
    """Return the manifest of the loaded files (path -> sha256), or None when no manifest matches them all."""
    for path in files:
        manifest = read_manifest(Path(path).parent)
        if manifest is not None and {Path(p).name: digest for p, digest in files.items()} == manifest.libraries:
            return manifest
    return None


def combined_digest(files: Mapping[str, str]) -> str:
    """Return one sha256 for several files: over the lines ``name sha256`` sorted by name."""
    lines = sorted(f"{Path(path).name} {digest}\n" for path, digest in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
