"""The benchmarks of the kernels, which `make test` does not run, can be run."""

from __future__ import annotations

import subprocess
import sys

from bitnet_py import _native
from tests.support.native_build import ROOT


def test_every_kernel_family_has_its_benchmarks() -> None:
    command = [sys.executable, "-m", "pytest", "tools/bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    families = [family.name for family in _native.kernel_families() if family.available]
    assert [name for name in families if f"-{name}]" not in done.stdout and f"[{name}]" not in done.stdout] == []
