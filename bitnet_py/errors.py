"""The exceptions of this package, with a common root, and the message with which a model is rejected."""

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
    """The C library is missing, of another ABI version, or rejected a call (forced kernel not available)."""


DAMAGED = "the file is damaged: copy or download it again"
"""A remedy for ``model_error``."""


def model_error(path: object, what: str, *, expected: object, found: object, remedy: str) -> ModelError:
    """Return a one-line ``ModelError``: file, what was looked at, expected, found, what to do."""
    line = f"{path}: {what}: expected {expected}, found {found}; {remedy}"
    return ModelError("".join(c if c.isprintable() else "\ufffd" for c in line))


def clip(text: str, limit: int = 60) -> str:
    """Return ``text`` quoted and shortened, fit for an error message."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
