"""The manifest beside a built library, which says how it was built, and when to believe it.

It is trusted only if the library's files have the digests it lists: identity comes from the files that a process
actually loaded, never from a file next to them.
"""

from __future__ import annotations

import hashlib
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
