"""The exceptions of this package, with a common root, and the message with which a model is rejected."""

from __future__ import annotations

from collections.abc import Sequence


class BitnetError(Exception):
    """Root of all errors raised by ``bitnet_py``. The message is one line, meant for a person."""

    def __str__(self) -> str:
        """Return the message; what a file holds may be in it."""
        return printable(super().__str__())


class ModelError(BitnetError):
    """The model file is missing, malformed, unsupported, or holds unusable values (NaN, zero scale)."""


class TokenizerError(BitnetError):
    """The tokenizer metadata is missing or unusable, or a token id is outside the vocabulary."""


class InputError(BitnetError):
    """The input to the engine is unusable: empty prompt, prompt longer than the context, bad sampling value."""


class NativeError(BitnetError):
    """The C library is missing, of another ABI version, or rejected a call (forced kernel not available)."""


def raised_by_library(error: BaseException) -> bool:
    """Return whether the ``tokenizers`` package raised this: bare ``Exception``, or what a panic of Rust code is.

    A panic is no ``Exception``, and its class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


DAMAGED = "the file is damaged: copy or download it again"
"""A remedy for ``model_error``."""


def model_error(path: object, what: str, *, expected: object, found: object, remedy: str) -> ModelError:
    """Return a one-line ``ModelError``: file, what was looked at, expected, found, what to do."""
    return ModelError(f"{path}: {what}: expected {expected}, found {found}; {remedy}")


MAX_LINE = 300
"""Characters of an error line; what is longer was put into a file or a name by somebody."""


def error_line(text: str) -> str:
    """Return a message as one printable line of at most ``MAX_LINE`` characters; of a longer one both ends."""
    return shortened(printable(shortened(text.strip())))  # before it is escaped, too: it may be megabytes


def printable(text: str) -> str:
    """Return a text with what cannot be printed escaped: control characters and ends of lines of every kind."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def shortened(text: str, limit: int = MAX_LINE) -> str:
    """Return a text of at most ``limit`` characters; of a longer one both ends."""
    n_head = 2 * limit // 3
    return text if len(text) <= limit else f"{text[:n_head]}…{text[n_head + 1 - limit :]}"


def clip(text: str, limit: int = 60) -> str:
    """Return ``text`` quoted and shortened, fit for an error message."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return at most ``most`` items as one text, and how many more there are."""
    more = len(items) - most
    return separator.join(items[:most]) + (f"{separator.strip(', ')} and {more} more" if more > 0 else "")
