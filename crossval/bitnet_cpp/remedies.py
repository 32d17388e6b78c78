"""The environment variables that lead to a library, and what messages say about getting one."""

from __future__ import annotations

LIBRARY_VARIABLE = "BITNET_CPP_LIB"
SOURCE_VARIABLE = "BITNET_CPP_DIR"
GENERATION_VARIABLE = "BITNET_CPP_GENERATION"
BUILD_DIR_VARIABLE = "BITNET_CPP_BUILD_DIR"

HOW_TO_GET = (
    f"run `make fetch-cpp` (downloads and builds it), or set {SOURCE_VARIABLE}=<bitnet.cpp checkout> and run it "
    f"(builds that, no network), or set {LIBRARY_VARIABLE}=<path of a ready libllama.so>"
)
STILL_WORKS = (
    "what works without it: recorded goldens (--reference TRACE_DIR), the specification (--reference spec), "
    "and the engine itself"
)
