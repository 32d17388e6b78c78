"""``examples/third_engine.py``, which is not in a package, as a module."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_engine.py"


@cache
def third_engine() -> ModuleType:
    """Return the example, loaded once."""
    spec = importlib.util.spec_from_file_location("third_engine", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
