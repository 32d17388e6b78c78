"""The AVX-512 and AMX kernels on CPUs without them: built on tests/csrc/emulated_avx512.h and emulated_amx.h."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_py._native import kernel_families
from tests.support.native_build import LIBRARY, ROOT, build

AVAILABLE = {f.name: f.available for f in kernel_families()}
EMULATED = ("avx512vnni", "amx")
TESTS = ("tests/property/test_kernels.py", "tests/parity/test_goldens.py")


@pytest.fixture(scope="module")
def run_emulated(tmp_path_factory):
    """One run of the tests of every family that this CPU lacks; what it printed."""
    if not AVAILABLE.get("avx2"):
        pytest.skip("AVX-512 and AMX kernels untested here: this CPU lacks AVX2 to emulate them")
    folder = tmp_path_factory.mktemp("emulated")
    build(ROOT, folder, "-DBITNET_TEST_BUILD=ON", "-DBITNET_TEST_OPTIONS=-O1")
    families = " or ".join(family for family in EMULATED if not AVAILABLE.get(family))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *TESTS, "-k", families],
        env={**os.environ, "BITNET_LIBRARY": str(folder / LIBRARY)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=480,
    )


@pytest.mark.long
@pytest.mark.parametrize("family", EMULATED)
def test_emulated_kernels_equal_scalar_and_the_goldens(family, request):
    if AVAILABLE.get(family):
        pytest.skip(f"this CPU runs the {family} kernels: nothing to emulate")
    done = request.getfixturevalue("run_emulated")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
    passed = [line for line in done.stdout.splitlines() if family in line and "PASSED" in line]
    for tests in TESTS:
        assert any(line.startswith(f"{tests}::") for line in passed), f"{tests} holds no test of {family} any more"
