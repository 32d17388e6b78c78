"""Run the faulty build of the engine inside this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from bitnet_py import _native

Select = Callable[[str], None]
"""Switches a fault on, given the words of ``BN_FAULT``; "" switches all off."""


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
