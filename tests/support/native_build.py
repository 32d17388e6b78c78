"""Build the C library from a source tree, as the wheel does."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libbitnet_native.so"


def build(source: Path, build_dir: Path, *options: str, target: str = "bitnet_native") -> None:
    """Configure and build one target of the tree at ``source`` with CMake options such as ``-DNAME=VALUE``."""
    tools = Path(sysconfig.get_path("scripts"))
    for command in (
        [tools / "cmake", "-S", source, "-B", build_dir, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
         f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *options],
        [tools / "cmake", "--build", build_dir, "--target", target],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
