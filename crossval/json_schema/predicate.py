"""Whether a value is valid by a JSON Schema: ``jsonschema_rs``, which says yes fast, and no messages.

It only says yes. What it refuses is left to ``jsonschema``, which says what is wrong, many times slower
(``violations``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jsonschema_rs

from bitnet_py.stops import stop_if_asked

Predicate = Callable[[Any], bool]
_EXACT = "x-exact"
"""Keyword that is put beside ``integer`` where 2.0 is none."""


def predicate(schema: Mapping[str, Any], part: str = "#", *, strict: bool = True) -> Predicate:
    """Return the function that says whether JSON is valid by a schema, or by a part of it.

    Args:
        schema: a JSON Schema (draft 2020-12) as parsed JSON; its references stay within it.
        part: a reference to that part: ``#/$defs/name``.
        strict: 2.0 is no integer.
    """
    whole = _marked(schema) if strict else dict(schema)
    asked = whole if part == "#" else {"$ref": part, "$defs": whole["$defs"]}
    check = jsonschema_rs.Draft202012Validator(asked, keywords={_EXACT: _Exact})

    def is_valid(value: Any) -> bool:
        try:
            return check.is_valid(value)
        except ValueError:  # what is no JSON, such as a number of NumPy
            return False
        finally:
            stop_if_asked()  # a signal that came within is swallowed there, and the answer may be either

    return is_valid


def _marked(schema: Any) -> Any:
    """Return a schema in which integers are asked to be exact."""
    if isinstance(schema, list):
        return [_marked(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    asked = schema.get("type", ())
    names = (asked,) if isinstance(asked, str) else asked if isinstance(asked, list) else ()
    own = {_EXACT: True} if "integer" in names and "number" not in names else {}
    return {**{key: _marked(value) for key, value in schema.items()}, **own}


class _Exact:
    """The keyword, as the library asks for it."""

    def __init__(self, parent: Any, value: Any, path: Any) -> None:
        """Take what the library gives; none of it matters."""

    def validate(self, instance: Any) -> None:
        """Refuse a float."""
        if isinstance(instance, float):
            raise ValueError
