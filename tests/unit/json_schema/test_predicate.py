"""The schema as a function says what the library says, of every keyword that the schemas use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from crossval import schema
from crossval.json_schema import violations
from crossval.json_schema.predicate import predicate

TREE = {"type": "object", "properties": {"down": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}}
DEFINITIONS = {"$defs": {"tree": {**TREE, "additionalProperties": False}, "two": {"const": 2}}}
ASKED: list[Any] = [
    *({"type": one} for one in ("object", "array", "string", "boolean", "null", "integer", "number")),
    {"type": ["integer", "null"]},
    {"type": ["string", "number"]},
    {"enum": ["a", None, 0, 1]},
    {"const": 1},
    {"const": True},
    {"const": "a"},
    {"minimum": 0},
    {"maximum": 1},
    {"exclusiveMinimum": 0, "maximum": 2},
    {"minLength": 1},
    {"maxLength": 2, "title": "says nothing"},
    {"pattern": "^[ab]+$"},
    {"items": {"type": "integer"}},
    {"items": {"type": "integer"}, "minItems": 1},
    {"items": {"type": "integer"}, "maxItems": 2},
    {"prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"prefixItems": [{"type": "integer"}], "items": {"type": "integer"}},
    {"uniqueItems": True, "items": {"type": ["integer", "string"]}},
    {"required": ["a"]},
    {"properties": {"a": {"type": "integer"}}},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"properties": {"a": True}, "additionalProperties": {"type": "string"}},
    {"properties": {"a": False}},
    {"propertyNames": {"pattern": "^a"}},
    {"maxProperties": 1},
    {"allOf": [{"type": "integer"}, {"minimum": 1}]},
    {"anyOf": [{"type": "string"}, {"minimum": 1}]},
    {"oneOf": [{"type": "integer"}, {"minimum": 1}]},
    {"not": {"type": "integer"}},
    {"if": {"type": "integer"}, "then": {"minimum": 1}},
    {"if": {"type": "integer"}, "then": {"minimum": 1}, "else": {"type": "string"}},
    {"if": {"required": ["a"]}, "else": {"required": ["b"]}},
    {"$ref": "#/$defs/tree"},
    {"$ref": "#/$defs/two", "type": "integer"},
    {"properties": {"b": {"$ref": "#/properties/a"}, "a": {"type": "integer"}}},
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 10**30, 0.0, 0.5, 1.0, 2.0, -0.0, float("nan"), float("inf"), 1e-300),
    *("", "a", "ab", "abb", "c", "a\n", "1"),
    *([], [1], [1, 2], [1, 2, 3], [1, 1], [1, 1.0], [True, 1], ["a", 1], ["a", "a"], ["a", 1, 2], [None], [[1]]),
    *({}, {"a": 1}, {"a": "x"}, {"a": 1, "b": 1}, {"b": "x"}, {"ab": 1, "a": 2}, {"b": 1.0}, {"b": True}),
    *({"down": None}, {"down": {"down": None}}, {"down": {"down": 1}}, {"down": {"up": 1}}),
    *(np.float64(1.5), np.float32(0.5), np.int64(1), (1, 2), object()),
]


@pytest.mark.parametrize("strict", [True, False])
def test_every_keyword_means_what_it_means_to_the_library(strict: bool) -> None:
    for asked in ASKED:
        whole = {**asked, **DEFINITIONS}
        ours, theirs = predicate(whole, strict=strict), violations.validator(whole, strict=strict)
        answers = {index: ours(value) for index, value in enumerate(VALUES)}
        assert answers == {index: theirs.is_valid(value) for index, value in enumerate(VALUES)}, asked
        assert set(answers.values()) == {True, False}, f"{asked} tells no values apart"


def keywords(value: Any, inside: str = "") -> Iterator[str]:
    """Yield the keywords of a schema; names of properties and of definitions are none."""
    if isinstance(value, list):
        for item in value:
            yield from keywords(item)
    elif isinstance(value, dict):
        named = inside in ("properties", "$defs")
        for name, item in value.items():
            if not named:
                yield name
            if name not in ("const", "enum", "default", "x-check", "x-kinds") or named:
                yield from keywords(item, "" if named else name)


def used() -> set[str]:
    files = schema.schema_dir().glob("*.json")
    return {word for file in files for word in keywords(json.loads(file.read_text(encoding="utf-8")))}


def test_every_keyword_of_the_schemas_is_tried() -> None:
    said = {"$schema", "$id", "$defs", "title", "description", "default", "x-check", "x-kinds"}
    assert used() - said == set(keywords(ASKED)) - said


@pytest.mark.parametrize(
    "asked",
    [
        {"format": "date"},
        {"patternProperties": {}},
        {"items": {"minContains": 1}},
        {"const": [1]},
        {"enum": ["a", {}]},
        {"enum": [1], "const": 1},
    ],
)
def test_what_is_not_known_is_refused_and_not_passed_over(asked: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown keywords \[|plain values"):
        predicate(asked)


def test_a_part_is_checked_by_its_definition() -> None:
    whole = {"type": "null", **DEFINITIONS}
    part = predicate(whole, "#/$defs/two")
    assert (part(2), part(1), predicate(whole)(2)) == (True, False, False)


def test_a_value_that_only_one_of_both_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_predicate", lambda name, part: lambda value: False)
    policy = {"schema_version": 1}
    with pytest.raises(AssertionError, match="valid to jsonschema"):
        schema.validate_policy(policy)


def test_a_valid_value_does_not_load_the_library() -> None:
    """It takes longer to load than most receipts to check."""
    check = "import sys, crossval.schema as one; one.validate_policy({'schema_version': 1})"
    code = f"{check}; assert 'jsonschema' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
