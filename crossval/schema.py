"""Strict JSON, and the JSON Schemas of receipts, policies and traces (``schemas/``)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from crossval.errors import BadInputError


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON strictly: UTF-8, no duplicate keys, no NaN or infinities (not even as ``1e999``).

    Raises:
        BadInputError: anything else; the message starts with ``where``.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return result

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"number out of range: {text[:40]}")
        return number

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_float=finite, parse_constant=refuse
        )
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not valid JSON: {one_line(error)}") from error


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


def _items(check: Any, asked: Any, value: Any, around: Any) -> Iterable[ValidationError]:
    """Check the items of a list, unless it has more than allowed: ``maxItems`` refuses it, at once."""
    if isinstance(value, list) and len(value) > around.get("maxItems", len(value)):
        return ()
    return Draft202012Validator.VALIDATORS["items"](check, asked, value, around) or ()


_Validator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]  # the stubs leave it untyped
    Draft202012Validator, {"items": _items}
)


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
    Draft202012Validator.check_schema(schema)
    return _Validator(_inlined(schema, schema.get("$defs", {}), ()))


@functools.cache
def _part_validator(definition: str) -> Draft202012Validator:
    schema = validator("receipt.v1").schema
    assert isinstance(schema, dict)  # JSON Schema would allow true and false, too
    definitions = schema["$defs"]
    return _Validator({**_inlined({"$ref": f"#/$defs/{definition}"}, definitions, ()), "$defs": definitions})


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
