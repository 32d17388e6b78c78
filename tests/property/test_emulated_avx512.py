"""The AVX-512 kernels on CPUs without AVX-512: built on an emulation in AVX2 (tests/csrc/emulated_avx512.h)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_py._native import kernel_families
from tests.native_build import LIBRARY, ROOT, build

AVAILABLE = {f.name: f.available for f in kernel_families()}
FAMILY = "avx512vnni"
TESTS = ("tests/property/test_kernels.py", "tests/parity/test_goldens.py")


@pytest.mark.skipif(
    not AVAILABLE.get("avx2"), reason="AVX-512 kernels untested here: this CPU lacks AVX2 to emulate it"
)
@pytest.mark.skipif(AVAILABLE.get(FAMILY, False), reason="this CPU runs the AVX-512 kernels: nothing to emulate")
def test_emulated_avx512_kernels_equal_scalar_and_the_goldens(tmp_path):
    build(ROOT, tmp_path, "-DBITNET_TEST_BUILD=ON")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *TESTS, "-k", FAMILY]
    done = subprocess.run(
        command,
        env={**os.environ, "BITNET_LIBRARY": str(tmp_path / LIBRARY)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
    for tests in TESTS:
        assert f"{tests}::" in done.stdout, f"{tests} holds no test of {FAMILY} any more"
