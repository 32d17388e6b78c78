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


def validator(schema: Mapping[str, Any], part: str = "#", *, strict: bool = True) -> Draft202012Validator:
    """Return the library's validator of a schema, or of the part of it that ``part`` (``#/$defs/name``) names.

    ``strict``: 2.0 is no integer.
    """
    build = _StrictValidator if strict else _Validator
    return build(schema if part == "#" else {"$ref": part, "$defs": schema["$defs"]})


def worst(check: Draft202012Validator, value: Any) -> ValidationError | None:
    """Return the error to show of a value; None: it is valid."""
    error: ValidationError | None = best_match(check.iter_errors(value))
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
    """Check that no text or number occurs twice in a list; ``items`` refuses all else in these lists."""
    plain = [item for item in value if isinstance(item, (str, int, float))] if isinstance(value, list) else []
    if len(set(plain)) < len(plain):
        yield ValidationError(f"{reprlib.repr(value)} has an item twice")


_Validator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]  # the stubs leave it untyped
    Draft202012Validator, {"items": _items, "uniqueItems": _unique}
)
_types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
_StrictValidator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]  # as above
    _Validator, type_checker=_types
)
"""For what crossval writes itself: 2.0 is no integer there."""
