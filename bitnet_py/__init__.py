"""An engine for 1.58-bit BitNet models whose results are bit-identical to bitnet.cpp's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_py.arithmetic import Arithmetic
    from bitnet_py.cache import KVCache
    from bitnet_py.embedding import embed
    from bitnet_py.errors import BitnetError, InputError, ModelError, NativeError, TokenizerError
    from bitnet_py.model import Forward, Model

__all__ = [
    "Arithmetic",
    "BitnetError",
    "Forward",
    "InputError",
    "KVCache",
    "Model",
    "ModelError",
    "NativeError",
    "TokenizerError",
    "embed",
]

_MODULES = {
    "Arithmetic": "arithmetic",
    "Forward": "model",
    "KVCache": "cache",
    "Model": "model",
    "embed": "embedding",
}
"""Public names that are not of ``bitnet_py.errors``: their module."""


def __getattr__(name: str) -> Any:
    """Load a public name on first access: a program that is only starting must not wait for NumPy."""
    if name not in __all__:
        raise AttributeError(f"module 'bitnet_py' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bitnet_py.{_MODULES.get(name, 'errors')}"), name)
