"""Every exception this package raises on purpose; one root so that callers can catch the package."""

from __future__ import annotations


class BitnetError(Exception):
    """Root of all errors raised by ``bitnet_py``. The message is one line, meant for a person."""


class ModelError(BitnetError):
    """The model file is missing, malformed, unsupported, or holds unusable values (NaN, zero scale)."""


class TokenizerError(BitnetError):
    """The tokenizer metadata is missing or unusable, or a token id is outside the vocabulary."""


class InputError(BitnetError):
    """The input to the engine is unusable: empty prompt, prompt longer than the context, bad sampling value."""


class NativeError(BitnetError):
    """The C library is missing, of another ABI version, or refused a call (forced kernel not available)."""
