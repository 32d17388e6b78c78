"""The environment variables that lead to a library, and what messages say about getting one."""

from __future__ import annotations

from pathlib import Path

LIBRARY_VARIABLE = "BITNET_CPP_LIB"
SOURCE_VARIABLE = "BITNET_CPP_DIR"
GENERATION_VARIABLE = "BITNET_CPP_GENERATION"
BUILD_DIR_VARIABLE = "BITNET_CPP_BUILD_DIR"


def build_command(project: Path) -> str:
    """Return what builds bitnet.cpp: in a checkout of the project its make target, else the module itself."""
    return "make fetch-cpp" if (project / "Makefile").is_file() else "python -m crossval.bitnet_cpp.build"


BUILD = build_command(Path(__file__).parents[2])
HOW_TO_BUILD = f"run `{BUILD}` (or set {SOURCE_VARIABLE} or {LIBRARY_VARIABLE})"
HOW_TO_GET = (
    f"run `{BUILD}` (downloads and builds it), or set {SOURCE_VARIABLE}=<bitnet.cpp checkout> and run it "
    f"(builds that, no network), or set {LIBRARY_VARIABLE}=<path of a ready libllama.so>"
)
STILL_WORKS = (
    "what works without it: recorded goldens (--reference TRACE_DIR), the specification (--reference spec), "
    "and the engine itself"
)
