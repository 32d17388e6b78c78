"""What is wrong with a value that a JSON Schema refuses: ``jsonschema``, and which of its errors is shown.

Imported only to refuse something: the library takes a while to load, and to say yes (``predicate`` does).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from crossval.json_schema.predicate import twice


def validator(schema: Mapping[str, Any], part: str = "#", *, strict: bool = True) -> Draft202012Validator:
    """Return the library's validator of a schema, or of the part of it that ``part`` (``#/$defs/name``) names.

    ``strict``: 2.0 is no integer.
    """
    definitions = schema.get("$defs", {})
    asked = schema if part == "#" else {"$ref": part}
    build = _StrictValidator if strict else _Validator
    return build({**_inlined(asked, definitions, ()), "$defs": definitions})


def worst(check: Draft202012Validator, value: Any) -> ValidationError:
    """Return the error to show of a value that is not valid."""
    error: ValidationError | None = best_match(check.iter_errors(value))
    assert error is not None, "refused by crossval.json_schema.predicate, valid to jsonschema"
    return error


_Errors = Iterable[ValidationError]


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
    """Check that no text or number occurs twice in a list."""
    if isinstance(value, list) and twice(value):
        yield ValidationError(f"{reprlib.repr(value)} has an item twice")


_Validator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]  # the stubs leave it untyped
    Draft202012Validator, {"items": _items, "uniqueItems": _unique}
)
_types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
_StrictValidator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]
    _Validator, type_checker=_types
)
"""For what crossval writes itself: 2.0 is no integer there."""


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
