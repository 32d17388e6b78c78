"""Run the faulty build of the engine: inside this process, or in another."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from bitnet_py import _native
from tests.zoo import build
from tests.zoo.catalogue import ENGINE_FAULTS
from tests.zoo.fault import EngineFault
from tests.zoo.faults import llama
from tests.zoo.faults.quiet import FAULTS as QUIET

Select = Callable[[str], None]
"""Switches a fault on, given the words of ``BN_FAULT``; "" switches all off."""


def all_faults() -> Path:
    """Return the path of the library with every C fault, none of them switched on; built on first use."""
    of_llama = [fault for fault in llama.OWN if isinstance(fault, EngineFault)]
    return build.build((*ENGINE_FAULTS, *QUIET, *of_llama))


@contextmanager
def faulty_library(path: Path) -> Iterator[Select]:
    """Use another C library for the block; models must be opened and closed inside it."""
    with patch.dict(os.environ, {_native.LIBRARY_VARIABLE: str(path)}):
        library = _native.library.__wrapped__()  # without its cache, which keeps the real one
    library.bn_zoo_select.argtypes = [ctypes.c_char_p]

    def select(text: str) -> None:
        assert library.bn_zoo_select(text.encode()) == 0, f"the library does not know the fault {text!r}"

    with patch.object(_native, "library", lambda: library):
        yield select
        select("")


def run(
    command: Sequence[str | Path], fault: str = "", *, kernel: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command on the faulty build with this fault switched on, and with one kernel family if named."""
    environment = {_native.LIBRARY_VARIABLE: str(all_faults()), "BN_FAULT": fault}
    if kernel is not None:
        environment["BITNET_KERNEL"] = kernel
    return subprocess.run(
        [*map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
