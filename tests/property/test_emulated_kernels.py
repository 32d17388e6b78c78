"""The AVX-512 and AMX kernels on CPUs without them: built on tests/csrc/emulated_avx512.h and emulated_amx.h."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_py._native import kernel_families
from tests.support.native_build import LIBRARY, ROOT, build

AVAILABLE = {f.name: f.available for f in kernel_families()}
TESTS = ("tests/property/test_kernels.py", "tests/parity/test_goldens.py")


@pytest.fixture(scope="module")
def emulating_library(tmp_path_factory):
    if not AVAILABLE.get("avx2"):
        pytest.skip("AVX-512 and AMX kernels untested here: this CPU lacks AVX2 to emulate them")
    folder = tmp_path_factory.mktemp("emulated")
    build(ROOT, folder, "-DBITNET_TEST_BUILD=ON")
    return folder / LIBRARY


@pytest.mark.long
@pytest.mark.parametrize("family", ["avx512vnni", "amx"])
def test_emulated_kernels_equal_scalar_and_the_goldens(emulating_library, family):
    if AVAILABLE.get(family):
        pytest.skip(f"this CPU runs the {family} kernels: nothing to emulate")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *TESTS, "-k", family]
    done = subprocess.run(
        command,
        env={**os.environ, "BITNET_LIBRARY": str(emulating_library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
    for tests in TESTS:
        assert f"{tests}::" in done.stdout, f"{tests} holds no test of {family} any more"
