"""Metadata values that replace those of a model file for one command: ``--override KEY=VALUE``.

What is in force is in force for the whole process: whoever opens a model sees the same metadata,
and a live reference is given the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from bitnet_py.errors import ModelError, clip

Value = bool | int | float | str
_READERS: dict[type, Callable[[str], Value]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
}
"""In the order in which they are tried: bool before int, of which it is a kind."""
_in_force: dict[str, str] = {}


@contextmanager
def overriding(values: Mapping[str, str]) -> Iterator[None]:
    """Let every model that is opened in the block have these values, as text, for these keys."""
    before = dict(_in_force)
    _in_force.update(values)
    try:
        yield
    finally:
        _in_force.clear()
        _in_force.update(before)


def typed(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """Return the values in force, each of the type that the file's own value has, or looks like where it has none.

    Raises ``ModelError`` for a value that is not of that type, and for an array.
    """
    return {key: _typed(key, text, metadata.get(key)) for key, text in _in_force.items()}


def applied(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file's metadata with the values in force. Raises ``ModelError`` as ``typed``."""
    return MappingProxyType({**metadata, **typed(metadata)}) if _in_force else metadata


def notes() -> list[str]:
    """Return a line for each value in force."""
    return [f"{key} is {text!r} by --override, whatever the file says" for key, text in _in_force.items()]


def _typed(key: str, text: str, stated: Any) -> Value:
    if stated is None:
        return _guessed(text)
    if isinstance(stated, str):
        return text
    kind = next((kind for kind in _READERS if isinstance(stated, kind)), None)
    if kind is None:
        raise ModelError(f"--override {key}: the file has an array there; only single values can be replaced")
    try:
        return _READERS[kind](text)
    except (KeyError, ValueError):
        raise ModelError(f"--override {key}={clip(text)}: expected {kind.__name__}, as the file has it") from None


def _guessed(text: str) -> Value:
    for read in _READERS.values():
        try:
            return read(text)
        except (KeyError, ValueError):
            continue
    return text
