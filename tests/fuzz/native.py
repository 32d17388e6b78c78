"""The C library's engine under libFuzzer: models and passes made of bytes (tests/csrc/fuzz_engine.c)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tests.support.checked_library import CHECKS, ROOT, MissingTool, Mistake, build_copy

SOURCES = ("bitnet_py/csrc", "tests/csrc")
NATIVE = "engine"
"""The target's word."""
CHECK = replace(CHECKS["sanitize"], options=(*CHECKS["sanitize"].options, "-O2"), mistakes=())


def compiler() -> str:
    """Return clang, which alone has libFuzzer.

    Raises:
        MissingTool: there is none.
    """
    found = next(
        (name for name in ("clang", *(f"clang-{n}" for n in range(22, 13, -1))) if shutil.which(name)), None
    )
    if found is None:
        raise MissingTool("clang is not installed (package clang, with its runtime libclang-rt-dev)")
    return found


def build_native(folder: Path, mistake: Mistake | None = None) -> Path:
    """Build the program that searches, from the sources as they are or with one mistake; one that is newer stays.

    Raises:
        MissingTool: there is no clang.
    """
    built = folder / "build" / "fuzz_engine"
    sources = [path for part in SOURCES for path in (ROOT / part).iterdir()]
    if mistake is None and built.exists() and built.stat().st_mtime > max(one.stat().st_mtime for one in sources):
        return built
    return build_copy(CHECK, folder, mistake, f"-DCMAKE_C_COMPILER={compiler()}", target="fuzz_engine")


def seeds() -> list[bytes]:
    """Return inputs whose first bytes choose different shapes; what all zeros choose is a whole model, too."""
    return [bytes((seed * 37 + i * i * (seed + 3)) % 251 for i in range(64)) for seed in range(12)]
