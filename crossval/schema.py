"""Strict JSON, and the JSON Schemas of receipts, policies and traces (``schemas/``)."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossval.errors import BadInputError
from crossval.json_schema.predicate import Predicate, predicate

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

MAX_DEPTH = 64
"""Lists and objects inside one another."""
MAX_VALUES = 1 << 22
"""Values in one JSON text. Each takes 60 bytes and more of memory, and of the text no more than two."""
MAX_DIGITS = 110
"""Of a whole number; the largest that any schema allows, 1e100, has 101."""


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON strictly: UTF-8, no duplicate keys, no NaN or infinities (not even as ``1e999``).

    Time and memory grow in proportion to ``data``; its size is for the caller to limit.

    Raises:
        BadInputError: anything else, more than ``MAX_VALUES`` values or ``MAX_DEPTH`` levels, or a whole number of
        more than ``MAX_DIGITS`` digits; the message starts with ``where``.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"duplicate key {twice[:80]!r}")
        return result

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"number out of range: {text[:40]}… of {len(text)} digits")
        return int(text)

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"number out of range: {text[:40]}")
        return number

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    # Every value but the first follows a comma or opens a list or object; those inside texts are counted, too.
    if sum(map(data.count, (b",", b"[", b"{"))) - data.count(b"[]") - data.count(b"{}") >= MAX_VALUES:
        raise BadInputError(f"{where}: more than {MAX_VALUES} values")
    hooks: dict[str, Any] = {"parse_int": whole, "parse_float": finite, "parse_constant": refuse}
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, **hooks)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not valid JSON: {one_line(error)}") from error
    if _deeper_than(value, MAX_DEPTH):
        raise BadInputError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    """Return whether lists and objects lie inside one another more than ``limit`` levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
    return bool(level)


def validate(receipt: Any, where: str = "receipt") -> None:
    """Check a receipt against ``schemas/receipt.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(receipt, "receipt.v1", where)


def validate_part(value: Any, definition: str, where: str) -> None:
    """Check a part of a receipt against its definition (``$defs``) in ``schemas/receipt.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(value, "receipt.v1", where, f"#/$defs/{definition}")


def validate_policy(policy: Any, where: str = "policy") -> None:
    """Check a gate policy against ``schemas/policy.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(policy, "policy.v1", where)


def validate_trace(value: Any, where: str) -> None:
    """Check the contents of a ``trace.json`` against ``schemas/trace.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(value, "trace.v1", where)


def validate_tap_map(value: Any, where: str) -> None:
    """Check a tap map against ``schemas/tap-map.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(value, "tap-map.v1", where)


def validate_sweep(value: Any, where: str) -> None:
    """Check the summary of a sweep against ``schemas/sweep.v1.schema.json``.

    Raises:
        BadInputError: naming the field and what is wrong with it.
    """
    _validate(value, "sweep.v1", where)


def _validate(value: Any, name: str, where: str, part: str = "#") -> None:
    if _predicate(name, part)(value):
        return
    from crossval.json_schema import violations

    error = violations.worst(validator(name, part), value)
    if error is None:
        return
    field = ".".join(str(one) for one in error.absolute_path) or "(top level)"
    schema_name = f"{name}.schema.json{part if part != '#' else ''}"
    raise BadInputError(f"{where}: violates {schema_name} at {field}: {one_line(error.message)}")


@functools.cache
def _predicate(name: str, part: str) -> Predicate:
    return predicate(load(name), part, strict=_is_strict(name))


@functools.cache
def validator(name: str, part: str = "#") -> Draft202012Validator:
    """Return the library's validator of ``schemas/{name}.schema.json``: it says what is wrong, and takes its time.

    Raises:
        BadInputError: the installation lacks the schema.
    """
    from crossval.json_schema import violations

    return violations.validator(load(name), part, strict=_is_strict(name))


def _is_strict(name: str) -> bool:
    """Return whether 2.0 is no integer: so it is in what crossval writes itself."""
    return name != "trace.v1"


@functools.cache
def load(name: str) -> dict[str, Any]:
    """Return ``schemas/{name}.schema.json``; it must not be changed.

    Raises:
        BadInputError: the installation lacks the schema.
    """
    path = schema_dir() / f"{name}.schema.json"
    try:
        schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"the installation is broken: cannot read {path}: {one_line(error)}") from error
    return schema


def schema_dir() -> Path:
    """Return the directory of the schemas: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve()
    packaged = here.parent / "_data" / "schemas"
    return packaged if packaged.is_dir() else here.parents[1] / "schemas"


def one_line(error: object, limit: int = 300) -> str:
    """Return an error as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
