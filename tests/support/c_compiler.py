"""The C compiler that stand-ins for libraries are made with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or shutil.which("clang-19")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="a C compiler is missing, so no library can be built")


def compile_library(path: Path, code: str, *options: str) -> Path:
    """Compile a shared library from C source text."""
    source = path.with_suffix(".c")
    source.write_text(code)
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(path), str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path
