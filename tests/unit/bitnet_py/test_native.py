"""The bridge to the C library: finding it, rejecting the wrong one, forcing kernels, errors as exceptions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bitnet_py import _kernels, _native
from bitnet_py import taps as engine_taps
from bitnet_py.config import POOLINGS, Activation, Pooling, RopePairing
from bitnet_py.errors import InputError, NativeError
from crossval.model import taps


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


LOAD = """
from bitnet_py import _kernels, _native
from bitnet_py.config import Activation, RopePairing
from bitnet_py.errors import NativeError
try:
    print(_native.library_path())
except NativeError as error:
    print("refused:", error)
"""


def test_scalar_is_always_available_and_last():
    families = _native.kernel_families()
    assert families[-1].name == "scalar"
    assert families[-1].available


CPU_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
    "amx": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"},
}


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="asks Linux what the processor has")
def test_a_family_is_available_only_where_linux_offers_its_instructions():
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    for family in _native.kernel_families():
        if family.available and family.name != "scalar":
            assert CPU_FLAGS[family.name] <= flags, family.name


def test_unknown_kernel_is_refused_with_the_known_names():
    with pytest.raises(NativeError, match=r"unknown kernel 'sse9'.*scalar"):
        _kernels.quantize(np.zeros(4, np.float32), kernel="sse9")


def test_kernel_this_cpu_lacks_is_refused_by_name():
    missing = [f for f in _native.kernel_families() if not f.available]
    if not missing:
        pytest.skip("this CPU runs every kernel family of the build")
    with pytest.raises(NativeError, match=rf"kernel '{missing[0].name}' needs"):
        _kernels.quantize(np.zeros(4, np.float32), kernel=missing[0].name)


def test_non_contiguous_array_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        _kernels.quantize(np.zeros((4, 4), np.float32)[:, 1])


def test_library_override_that_does_not_exist_is_refused(tmp_path):
    assert "refused: BITNET_LIBRARY=" in run_python(LOAD, BITNET_LIBRARY=str(tmp_path / "none.so")).stdout


def test_library_that_is_no_library_is_refused(tmp_path):
    path = tmp_path / "text.so"
    path.write_text("not a library")
    assert "refused: cannot load the C library" in run_python(LOAD, BITNET_LIBRARY=str(path)).stdout


def test_library_of_another_program_is_refused():
    import _ctypes

    assert "refused: cannot load the C library" in run_python(LOAD, BITNET_LIBRARY=_ctypes.__file__).stdout


def test_tap_order_of_the_c_library_is_the_harness_vocabulary():
    """The harness may know fewer: its graphs of the embedding models come after the engine's."""
    known = (*taps.INPUT_TAPS, *taps.LAYER_TAPS, *taps.HEAD_TAPS)
    assert tuple(tap for tap in engine_taps.LAYER_TAPS if tap in known) == taps.LAYER_TAPS
    assert {tap for tap in engine_taps.MODEL_TAPS if tap in known} == {*taps.INPUT_TAPS, *taps.HEAD_TAPS}


@pytest.mark.parametrize(
    ("first", "end", "prefix", "names"),
    [
        ("BN_TAP_ATTN_NORM,", "BN_LAYER_TAPS", "BN_TAP_", engine_taps.LAYER_TAPS),
        ("BN_RELU_SQUARED,", "BN_ACTIVATIONS", "BN_", _native.ACTIVATIONS),
        ("BN_ROPE_HALVES,", "BN_ROPE_PAIRINGS", "BN_ROPE_", _native.ROPE_PAIRINGS),
        ("BN_POOL_NONE,", "BN_POOLINGS", "BN_POOL_", POOLINGS),
    ],
)
def test_enums_of_the_header_are_in_the_same_order(first, end, prefix, names):
    header = (Path(engine_taps.__file__).parent / "csrc" / "bitnet.h").read_text()
    body = re.sub(r"/\*.*?\*/", "", header[header.index(first) : header.index(end)])
    assert tuple(item.strip().removeprefix(prefix).lower() for item in body.split(",") if item.strip()) == names


def test_names_of_the_python_side_are_those_of_the_c_library():
    assert get_args(Activation) == _native.ACTIVATIONS
    assert get_args(RopePairing) == _native.ROPE_PAIRINGS
    assert get_args(Pooling) == POOLINGS


def test_the_bridge_needs_nothing_of_the_package_but_its_errors():
    source = Path(_native.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (bitnet_py[\w.]*)", source, re.M))
    assert imported == {"bitnet_py.errors"}


def test_unknown_tap_is_refused(tiny_model):
    with pytest.raises(InputError, match=r"no tap 'blk\.99\.q'"):
        tiny_model.forward([1], tiny_model.new_cache(), taps=["blk.99.q"])


def test_libm_of_this_machine_is_one_that_references_were_recorded_with():
    import platform

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc: recorded references may differ in single bits of RoPE here")
    assert _native.libm_name() is not None


def test_unknown_libm_is_said_to_be_unknown(monkeypatch):
    monkeypatch.setattr(_native, "RECORDED_LIBM", {})
    _native.libm_name.cache_clear()
    assert _native.libm_name() is None
    _native.libm_name.cache_clear()
