"""Mainline llama.cpp as the package ``llama-cpp-python`` installs it, found without importing the package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

DISTRIBUTION = "llama-cpp-python"
MODULE = "llama_cpp"
LIBRARY_NAME = "libllama.so"
HOW_TO_GET = "run `pip install 'bitnet-parity[llama]'`"


def version() -> str | None:
    """Return the version of the installed package, or None when it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_library() -> Path | None:
    """Return the libllama inside the installed package, or None when there is none."""
    found = importlib.util.find_spec(MODULE)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / "lib" / LIBRARY_NAME
        if path.is_file():
            return path
    return None
