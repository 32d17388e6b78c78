"""The fast library says yes to nothing that the other one refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bitnet_py.stops import Terminated, forget_stops, stopping
from crossval import schema
from crossval.errors import BadInputError
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
    *(None, True, False, 0, 1, 2, -1, 10**30, 0.0, 0.5, 1.0, 2.0, -0.0, 1e-300),
    *("", "a", "ab", "abb", "c", "1"),
    *([], [1], [1, 2], [1, 2, 3], [1, 1], [1, 1.0], [True, 1], ["a", 1], ["a", "a"], ["a", 1, 2], [None], [[1]]),
    *({}, {"a": 1}, {"a": "x"}, {"a": 1, "b": 1}, {"b": "x"}, {"ab": 1, "a": 2}, {"b": 1.0}, {"b": True}),
    *({"down": None}, {"down": {"down": None}}, {"down": {"down": 1}}, {"down": {"up": 1}}),
]
FOREIGN: list[Any] = [float("nan"), np.float64(1.5), np.float32(0.5), np.int64(1), object(), {1: 2}]


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_accepted_that_the_library_of_messages_refuses(strict: bool) -> None:
    """JSON is judged alike; what no JSON file can hold may be refused here, and is looked at again."""
    for asked in ASKED:
        whole = {**asked, **DEFINITIONS}
        ours, theirs = predicate(whole, strict=strict), violations.validator(whole, strict=strict)
        answers = {index: ours(value) for index, value in enumerate(VALUES)}
        assert answers == {index: theirs.is_valid(value) for index, value in enumerate(VALUES)}, asked
        assert set(answers.values()) == {True, False}, f"{asked} tells no values apart"
        for value in FOREIGN:
            assert theirs.is_valid(value) or not ours(value), (asked, value)


def test_a_part_is_checked_by_its_definition() -> None:
    whole = {"type": "null", **DEFINITIONS}
    part = predicate(whole, "#/$defs/two")
    assert (part(2), part(1), predicate(whole)(2)) == (True, False, False)


def test_what_is_refused_here_alone_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_predicate", lambda name, part: lambda value: False)
    schema.validate_policy({"schema_version": 1})
    with pytest.raises(BadInputError, match=r"violates policy\.v1\.schema\.json at schema_version"):
        schema.validate_policy({"schema_version": 2})


def test_a_valid_value_does_not_load_the_library() -> None:
    """It takes longer to load than most receipts to check."""
    check = "import sys, crossval.schema as one; one.validate_policy({'schema_version': 1})"
    code = f"{check}; assert 'jsonschema' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_signal_within_the_library_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows what the handler raises, and says yes or no."""
    check = predicate({"type": "integer"})
    assert check(1)

    def validate(keyword: object, instance: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("crossval.json_schema.predicate._Exact.validate", validate)
    with stopping(), pytest.raises(Terminated):
        check(1)
    forget_stops()
