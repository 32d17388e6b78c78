"""Strict JSON, and the JSON Schemas of receipts, policies and traces (``schemas/``)."""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from crossval.errors import BadInputError

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
    _check(value, _part_validator(definition), f"receipt.v1.schema.json#/$defs/{definition}", where)


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


_Errors = Iterable[ValidationError]
_valid: set[tuple[int, type, Any]] = set()
"""Plain values found valid, by the schema asked of them: tables hold the same few again and again."""
_MAX_VALID = 1 << 16
_MAX_REMEMBERED = 100
"""Characters of a text."""


def _properties(check: Any, asked: Any, value: Any, around: Any) -> _Errors:
    """Check the members of an object; a plain value that was found valid is not looked at again."""
    if not isinstance(value, dict):
        return
    for name, schema in asked.items():
        if name not in value:
            continue
        member = value[name]
        long = isinstance(member, (dict, list)) or (isinstance(member, str) and len(member) > _MAX_REMEMBERED)
        known = None if long else (id(schema), type(member), member)
        if known in _valid:
            continue
        wrong = list(check.descend(member, schema, path=name, schema_path=name))
        yield from wrong
        if known is not None and not wrong:
            if len(_valid) >= _MAX_VALID:
                _valid.clear()
            _valid.add(known)


def _items(check: Any, asked: Any, value: Any, around: Any) -> _Errors:
    """Check the items of a list up to the first that is wrong: each error takes more memory than the item.

    Of a list that has more than allowed none is looked at: ``maxItems`` refuses it, at once.
    """
    if not isinstance(value, list) or len(value) > around.get("maxItems", len(value)):
        return ()
    if isinstance(asked, bool) or "prefixItems" in around:
        return Draft202012Validator.VALIDATORS["items"](check, asked, value, around) or ()
    wrong = (list(check.descend(item, asked, path=index)) for index, item in enumerate(value))
    return next(filter(None, wrong), ())


def _unique(check: Any, asked: Any, value: Any, around: Any) -> _Errors:
    """Check that no text or number occurs twice in a list; ``items`` refuses anything else in these lists."""
    if isinstance(value, list):
        plain = [item for item in value if isinstance(item, (str, int, float))]
        if len(set(plain)) < len(plain):
            yield ValidationError(f"{reprlib.repr(value)} has an item twice")


_Validator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]  # the stubs leave it untyped
    Draft202012Validator, {"properties": _properties, "items": _items, "uniqueItems": _unique}
)
_types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
_StrictValidator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]
    _Validator, type_checker=_types
)
"""For what crossval writes itself: 2.0 is no integer there."""


def _validate(value: Any, schema_name: str, where: str) -> None:
    _check(value, validator(schema_name), f"{schema_name}.schema.json", where)


def _check(value: Any, check: Draft202012Validator, schema_name: str, where: str) -> None:
    error = None if check.is_valid(value) else best_match(check.iter_errors(value))
    if error is not None:
        field = ".".join(str(part) for part in error.absolute_path) or "(top level)"
        raise BadInputError(f"{where}: violates {schema_name} at {field}: {one_line(error.message)}")


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Return the validator of ``schemas/{name}.schema.json``.

    Raises:
        BadInputError: the installation lacks the schema.
    """
    path = schema_dir() / f"{name}.schema.json"
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"the installation is broken: cannot read {path}: {one_line(error)}") from error
    build = _Validator if name == "trace.v1" else _StrictValidator
    return build(_inlined(schema, schema.get("$defs", {}), ()))


@functools.cache
def _part_validator(definition: str) -> Draft202012Validator:
    schema = validator("receipt.v1").schema
    assert isinstance(schema, dict)  # JSON Schema would allow true and false, too
    definitions = schema["$defs"]
    return _StrictValidator({**_inlined({"$ref": f"#/$defs/{definition}"}, definitions, ()), "$defs": definitions})


def _inlined(schema: Any, definitions: dict[str, Any], inside: tuple[str, ...]) -> Any:
    """Return the schema with local references inlined, which makes validation several times faster.

    Recursive references stay as they are, and so do the definitions, which they need.
    """
    if isinstance(schema, list):
        return [_inlined(item, definitions, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in definitions and name not in inside:
        target = _inlined(definitions[name], definitions, (*inside, name))
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "description")}
        return target if not beside else {"allOf": [target], **beside}
    return {
        key: value if key == "$defs" else _inlined(value, definitions, inside) for key, value in schema.items()
    }


def schema_dir() -> Path:
    """Return the directory of the schemas: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve()
    packaged = here.parent / "_data" / "schemas"
    return packaged if packaged.is_dir() else here.parents[1] / "schemas"


def one_line(error: object, limit: int = 300) -> str:
    """Return an error as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
