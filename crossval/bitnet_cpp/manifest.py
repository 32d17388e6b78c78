"""The manifest beside a built library, which says how it was built, and when to believe it.

It is believed only for the files whose digests it lists, and only where it was written: in the build directory
that CMake itself recorded, with the options that the manifest states. Otherwise a library's provenance is unknown.
That a whole build directory was forged is not seen here (docs/trust.md).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.errors import BadInputError
from crossval.files import read_limited
from crossval.schema import parse_json

LIBRARY_NAME = "libllama.so"
MANIFEST_NAME = "bitnet_cpp_build.json"
MANIFEST_VERSION = 1
MAX_BYTES = 16 << 20
CMAKE_DIR, SHADOW_DIR = "cmake", "source"
"""Within a build directory, beside the folder of the library: CMake's own files, and the tree that was built."""
CMAKE_CACHE = "CMakeCache.txt"


@dataclass(frozen=True)
class BuildManifest:
    """How a library was built; ``libraries`` maps file name -> sha256, ``data`` is the whole file."""

    source_commit: str | None
    source_digest: str
    compiler: str
    flags: str
    libraries: Mapping[str, str]
    data: Mapping[str, Any]


def read_manifest(directory: Path) -> BuildManifest | None:
    """Return the manifest in a directory, or None when there is none of this version."""
    try:
        path = directory / MANIFEST_NAME
        data = parse_json(read_limited(path, "manifest", MAX_BYTES), str(path))
        if data["version"] != MANIFEST_VERSION:
            return None
        compiler, flags = data["compiler"]["version"], data["cmake"]["flags"]
        libraries = {str(name): str(digest) for name, digest in data["libraries"].items()}
        commit, digest = data["source"]["commit"], data["source"]["digest"]
    except (BadInputError, KeyError, TypeError, AttributeError):
        return None
    if not all(isinstance(text, str) for text in (compiler, flags, digest)) or not isinstance(commit, str | None):
        return None
    return BuildManifest(commit, digest, compiler, flags, libraries, data)


def manifest_for(files: Mapping[str, str]) -> BuildManifest | None:
    """Return the manifest of the loaded files (path -> sha256), or None when none is to be believed."""
    for directory in {Path(path).parent for path in files}:
        manifest = read_manifest(directory)
        if manifest is None or {Path(p).name: digest for p, digest in files.items()} != manifest.libraries:
            continue
        if _built_in(directory.parent, manifest.data):
            return manifest
    return None


def _built_in(directory: Path, data: Mapping[str, Any]) -> bool:
    """Return whether CMake's record in a build directory is that of the build which a manifest describes."""
    try:
        cache = read_cmake_cache(directory / CMAKE_DIR / CMAKE_CACHE)
        here = Path(cache["CMAKE_CACHEFILE_DIR"]).resolve() == (directory / CMAKE_DIR).resolve()
        trees = {Path(data["source"]["path"]).resolve(), (directory / SHADOW_DIR).resolve()}
        stated = data["cmake"]["cache"]
        same = bool(stated) and all(cache.get(name) == value for name, value in stated.items())
        return here and same and Path(cache["CMAKE_HOME_DIRECTORY"]).resolve() in trees
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # ValueError: a path with a NUL
        return False


def read_cmake_cache(path: Path) -> dict[str, str]:
    """Return the entries of a CMakeCache.txt (``NAME:TYPE=VALUE`` lines).

    Raises:
        OSError: it cannot be read.
    """
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"([A-Za-z_][\w.+-]*):\w+=(.*)$", line)
        if match:
            entries[match.group(1)] = match.group(2)
    return entries


def combined_digest(files: Mapping[str, str]) -> str:
    """Return one sha256 for several files: over the lines ``name sha256`` sorted by name."""
    lines = sorted(f"{Path(path).name} {digest}\n" for path, digest in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
