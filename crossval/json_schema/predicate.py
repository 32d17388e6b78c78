"""A JSON Schema as one function from value to yes or no: what a receipt costs to check, and no messages.

It knows the keywords that ``schemas/`` uses and refuses to be built from any other; ``jsonschema`` says the same
of every value, many times slower, and why (``crossval.schema``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

Predicate = Callable[[Any], bool]

ANNOTATIONS = frozenset(("$schema", "$id", "$defs", "title", "description", "default", "x-check", "x-kinds"))
"""Keywords that ask nothing of a value."""
_EXACT: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def predicate(schema: Mapping[str, Any], part: str = "#", *, strict: bool = True) -> Predicate:
    """Return the function that says whether a value is valid by a schema, or by a part of it.

    Args:
        schema: a JSON Schema (draft 2020-12) as parsed JSON; its references stay within it.
        part: a reference to that part: ``#/$defs/name``.
        strict: 2.0 is no integer.

    Raises:
        ValueError: a keyword that is not known here.
    """
    return _Builder(schema, strict).reference({"$ref": part})


class _Builder:
    def __init__(self, schema: Mapping[str, Any], strict: bool) -> None:
        self.schema, self.strict = schema, strict
        self.named: dict[str, Predicate] = {}

    def of(self, schema: Any) -> Predicate:
        if isinstance(schema, bool):
            return lambda value: schema
        asked = {key: wanted for key, wanted in schema.items() if key not in ANNOTATIONS}
        tests: list[Predicate] = []
        for keywords, build in _GROUPS.items():
            group = {key: asked.pop(key) for key in keywords if key in asked}
            if group:
                tests.append(build(self, group))
        if asked:
            raise ValueError(f"unknown keywords {sorted(asked)}")
        return _all(tests)

    def reference(self, group: Mapping[str, Any]) -> Predicate:
        name = group["$ref"]
        if name not in self.named:
            self.named[name] = lambda value: self.named[name](value)  # for what refers to it from within
            part: Any = self.schema
            for key in name.split("/")[1:]:
                part = part[key]
            self.named[name] = self.of(part)
        return self.named[name]

    def types(self, group: Mapping[str, Any]) -> Predicate:
        names = [group["type"]] if isinstance(group["type"], str) else group["type"]
        exact = frozenset(one for name in names for one in _EXACT[name])
        kinds = tuple({dict, list, str}.intersection(exact))
        number, whole = "number" in names, "integer" in names and not self.strict

        if exact == {dict}:
            return lambda value: isinstance(value, dict)

        def test(value: Any) -> bool:
            if type(value) in exact or isinstance(value, kinds):
                return True
            if isinstance(value, bool):
                return False
            if whole and isinstance(value, float) and value.is_integer():
                return True
            return number and isinstance(value, Number)

        return test

    def one_of_these(self, group: Mapping[str, Any]) -> Predicate:
        allowed = [*group.get("enum", ()), *([group["const"]] if "const" in group else ())]
        if len(group) > 1 or any(isinstance(one, (dict, list)) for one in allowed):
            raise ValueError("enum and const of plain values, one of both")
        texts = frozenset(one for one in allowed if isinstance(one, str))
        others = [one for one in allowed if not isinstance(one, str)]

        def test(value: Any) -> bool:
            if isinstance(value, str):
                return value in texts
            # To Python 1 and true are equal.
            return any(one is value or (bool not in (type(one), type(value)) and one == value) for one in others)

        return test

    def text(self, group: Mapping[str, Any]) -> Predicate:
        low, high = group.get("minLength", 0), group.get("maxLength", float("inf"))
        found = re.compile(group.get("pattern", "")).search
        return lambda value: not isinstance(value, str) or (low <= len(value) <= high and bool(found(value)))

    def number(self, group: Mapping[str, Any]) -> Predicate:
        low, high = group.get("minimum", -float("inf")), group.get("maximum", float("inf"))
        above = group.get("exclusiveMinimum")

        def test(value: Any) -> bool:
            if isinstance(value, bool) or not (type(value) in (int, float) or isinstance(value, Number)):
                return True
            return not (value < low or value > high or (above is not None and value <= above))

        return test

    def array(self, group: Mapping[str, Any]) -> Predicate:
        low, high = group.get("minItems", 0), group.get("maxItems", float("inf"))
        first = [self.of(one) for one in group.get("prefixItems", ())]
        item, unique = self.of(group.get("items", True)), group.get("uniqueItems", False)

        def test(value: Any) -> bool:
            if not isinstance(value, list):
                return True
            if not low <= len(value) <= high or not all(map(item, value[len(first) :] if first else value)):
                return False
            if first and not all(one(part) for one, part in zip(first, value, strict=False)):
                return False
            return not unique or not twice(value)

        return test

    def object(self, group: Mapping[str, Any]) -> Predicate:
        required, high = group.get("required", ()), group.get("maxProperties", float("inf"))
        members = {name: self.of(one) for name, one in group.get("properties", {}).items()}
        further, name_of = self.of(group.get("additionalProperties", True)), group.get("propertyNames")
        named = None if name_of is None else self.of(name_of)

        def test(value: Any) -> bool:
            if not isinstance(value, dict):
                return True
            if len(value) > high:
                return False
            for name in required:
                if name not in value:
                    return False
            if named is not None and not all(map(named, value)):
                return False
            for name, member in value.items():  # noqa: SIM110  # faster than all() of a generator, here as below
                if not members.get(name, further)(member):
                    return False
            return True

        return test

    def every(self, group: Mapping[str, Any]) -> Predicate:
        return _all([self.of(one) for one in group["allOf"]])

    def some(self, group: Mapping[str, Any]) -> Predicate:
        choices = [self.of(one) for one in group["anyOf"]]

        def test(value: Any) -> bool:
            for choice in choices:  # noqa: SIM110
                if choice(value):
                    return True
            return False

        return test

    def exactly_one(self, group: Mapping[str, Any]) -> Predicate:
        choices = [self.of(one) for one in group["oneOf"]]
        return lambda value: sum(choice(value) for choice in choices) == 1

    def no(self, group: Mapping[str, Any]) -> Predicate:
        refused = self.of(group["not"])
        return lambda value: not refused(value)

    def condition(self, group: Mapping[str, Any]) -> Predicate:
        given = self.of(group.get("if", True))
        then, other = self.of(group.get("then", True)), self.of(group.get("else", True))
        return lambda value: (then if given(value) else other)(value)


_GROUPS: Mapping[tuple[str, ...], Callable[[_Builder, Mapping[str, Any]], Predicate]] = {
    ("type",): _Builder.types,
    ("enum", "const"): _Builder.one_of_these,
    ("$ref",): _Builder.reference,
    ("pattern", "minLength", "maxLength"): _Builder.text,
    ("minimum", "maximum", "exclusiveMinimum"): _Builder.number,
    ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"): _Builder.array,
    ("properties", "required", "additionalProperties", "propertyNames", "maxProperties"): _Builder.object,
    ("allOf",): _Builder.every,
    ("anyOf",): _Builder.some,
    ("oneOf",): _Builder.exactly_one,
    ("not",): _Builder.no,
    ("if", "then", "else"): _Builder.condition,
}
"""Keywords that one function tests together, cheap ones first."""


def twice(items: Sequence[Any]) -> bool:
    """Return whether a text or number occurs twice; ``items`` refuses all else in these lists."""
    plain = [item for item in items if isinstance(item, (str, int, float))]
    return len(set(plain)) < len(plain)


def _all(tests: Sequence[Predicate]) -> Predicate:
    if len(tests) == 1:
        return tests[0]
    if len(tests) == 2:
        first, second = tests
        return lambda value: first(value) and second(value)

    def test(value: Any) -> bool:
        for one in tests:  # noqa: SIM110
            if not one(value):
                return False
        return True

    return test
