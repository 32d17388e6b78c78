"""Strict JSON and its limits, and what every schema bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from crossval import schema
from crossval.errors import BadInputError
from tests.support import receipt_samples as samples

SCHEMAS = ("receipt.v1", "policy.v1", "trace.v1", "tap-map.v1", "sweep.v1")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_json_schemas(name: str) -> None:
    """Checked here and not by every command: it takes longer than most receipts."""
    path = schema.schema_dir() / f"{name}.schema.json"
    Draft202012Validator.check_schema(json.loads(path.read_text(encoding="utf-8")))
    assert {file.name for file in schema.schema_dir().glob("*.json")} == {f"{one}.schema.json" for one in SCHEMAS}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "duplicate key 'a'"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 levels deep"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 111, f"out of range: {'1' * 40}… of 111 digits"),
        ("-" + "1" * 4300, "of 4301 digits"),
        ("1e400", "out of range"),
        ("[NaN]", "NaN is not JSON"),
    ],
)
def test_what_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInputError, match=r"^here: ") as caught:
        schema.parse_json(text.encode(), "here")
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 320


def test_what_is_within_the_limits() -> None:
    assert schema.parse_json(b"[" * 64 + b"]" * 64, "here") == json.loads("[" * 64 + "]" * 64)
    assert schema.parse_json(b"9" * 110, "here") == int("9" * 110)
    assert schema.parse_json('{"a": [1, "é"], "b": {"a": -1.5e300}}'.encode(), "here")["b"]["a"] == -1.5e300


def test_the_number_of_values_is_limited_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MAX_VALUES", 10)
    assert schema.parse_json(b"[[],[],[],[],[],[],[],[],{}]", "here") == [[]] * 8 + [{}]
    monkeypatch.setattr(json, "loads", None)
    for text in (
        b"[[],[],[],[],[],[],[],[],[],[],{}]",
        b"[1,1,1,1,1,1,1,1,1,1,1]",
        b'[{"a":[{}]},{"a":[{}]},{"a":[{}]},{"a":1}]',
    ):
        with pytest.raises(BadInputError, match="here: more than 10 values"):
            schema.parse_json(text, "here")


def parts(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object of a schema with its place."""
    if isinstance(value, dict):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from parts(item, f"{path}/{name}")


def bounds_of(part: dict[str, Any]) -> list[str]:
    """Return the bounds that a part of a schema needs for its types and lacks."""
    kinds = part.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    lacking = []
    if "array" in kinds and part.get("maxItems", 1 << 30) > 1 << 20:
        lacking.append("maxItems")
    if "string" in kinds and part.get("maxLength", 1 << 30) > 1 << 22:
        lacking.append("maxLength")
    if "object" in kinds and part.get("additionalProperties") is not False and "maxProperties" not in part:
        lacking.append("maxProperties")
    if {"integer", "number"} & set(kinds):
        largest = 2**53 if "integer" in kinds else 1e100
        low, high = part.get("minimum", part.get("exclusiveMinimum")), part.get("maximum")
        if low is None or high is None or max(abs(low), abs(high)) > largest:
            lacking.append("minimum and maximum")
    return lacking


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_list_text_and_number_of_a_schema_is_bounded(name: str) -> None:
    found = dict(parts(json.loads((schema.schema_dir() / f"{name}.schema.json").read_text(encoding="utf-8"))))
    assert len(found) > 20, name
    assert {path: lacking for path, part in found.items() if (lacking := bounds_of(part))} == {}


def test_a_number_of_a_receipt_is_at_most_1e100() -> None:
    shape = {**samples.MODEL["shape"]}
    good = samples.layers_receipt()
    for number in (1e100, -1e100, 10**99):
        schema.validate({**good, "model": {**samples.MODEL, "shape": {**shape, "rope_base": number}}})
    for number in (1.1e100, -1.1e100, 10**101):
        with pytest.raises(BadInputError, match="rope_base"):
            schema.validate({**good, "model": {**samples.MODEL, "shape": {**shape, "rope_base": number}}})


@pytest.mark.parametrize("value", [1.0, True, 2**53, -1, "1", None])
def test_an_integer_of_a_receipt_is_an_integer(value: Any) -> None:
    good = samples.layers_receipt()
    shape = {**samples.MODEL["shape"], "n_layers": value}
    with pytest.raises(BadInputError, match=r"model\.shape\.n_layers"):
        schema.validate({**good, "model": {**samples.MODEL, "shape": shape}})


def test_what_was_valid_once_is_not_taken_for_another_type_or_field() -> None:
    """Plain values found valid are remembered."""
    good = samples.layers_receipt()
    for _ in range(2):
        schema.validate(good)
        for field, value in (("dirty", 0), ("dirty", 1.0), ("commit", "parity"), ("version", True)):
            with pytest.raises(BadInputError, match=f"tool.{field}"):
                schema.validate({**good, "tool": {**good["tool"], field: value}})


def test_only_the_first_wrong_item_of_a_list_is_looked_at() -> None:
    good = samples.layers_receipt()
    looked_at = list(schema.validator("receipt.v1").iter_errors({**good, "notes": [1] * 50}))
    assert [list(error.absolute_path) for error in looked_at] == [["notes", 0]]
    many = list(schema.validator("receipt.v1").iter_errors({**good, "notes": [1] * 101}))
    assert [list(error.absolute_path) for error in many] == [["notes"]]
    with pytest.raises(BadInputError, match=r"notes\.1: 2 is not of type 'string'"):
        schema.validate({**good, "notes": ["x", 2, "y", 3]})


def test_an_item_that_occurs_twice_is_refused() -> None:
    made = samples.metamorphic_receipt()
    made["thresholds"] = {**made["thresholds"], "lengths": [4, 5, 4]}
    with pytest.raises(BadInputError, match=r"twice|thresholds"):
        schema.validate(made)
