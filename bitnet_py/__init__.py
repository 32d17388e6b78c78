"""An engine for 1.58-bit BitNet models whose results are bit-identical to bitnet.cpp's."""

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
