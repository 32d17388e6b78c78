"""YAML as strict as JSON."""

from __future__ import annotations

import json

import pytest

from crossval import schema
from crossval.errors import BadInputError
from crossval.receipts.yaml_text import MAX_YAML_BYTES, parse_yaml


def test_scalars_are_those_of_json() -> None:
    text = "a: no\nb: 1e-6\nc: 012\nd: true\ne: null\nf:\ng: 2026-01-01\nh: '1'\ni: -1.5E+3\nj: 0x1f\n"
    text += "k: [.inf, 1_0]\n"
    assert parse_yaml(text.encode(), "here") == {
        "a": "no", "b": 1e-6, "c": "012", "d": True, "e": None, "f": None, "g": "2026-01-01", "h": "1",
        "i": -1500.0, "j": "0x1f", "k": [".inf", "1_0"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, 1e-7, "é", None, True, {"b": []}]}, [], "x", 3, None, {"a b": "c: d"}]
)
def test_json_is_yaml(value: object) -> None:
    assert parse_yaml(json.dumps(value).encode(), "here") == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 1\n", "duplicate key 'a'"),
        ("a: {b: 1, b: 1}", "duplicate key 'b'"),
        ("1: a", "a key that is no text"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: !!python/name:os.system x", "tags are not accepted"),
        ("a: !!binary aGk=", "tags are not accepted"),
        ("--- a\n--- b\n", "single document"),
        ("a: 1e400", "out of range"),
        ("a: " + "1" * 111, "out of range"),
        ("[" * 65 + "]" * 65, "nested more than 64"),
        ("[" * 50_000, "nested more than 64"),
        ("a: b: c", "not valid YAML"),
        ("a: '\x07'", "not valid YAML"),
        ("#" * (MAX_YAML_BYTES + 1), "write it as JSON"),
    ],
)
def test_what_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInputError, match=r"^here: ") as caught:
        parse_yaml(text.encode(), "here")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BadInputError, match="here: not valid YAML"):
        parse_yaml(b"a: \xff", "here")


def test_depth_is_that_of_json() -> None:
    text = b"[" * schema.MAX_DEPTH + b"]" * schema.MAX_DEPTH
    assert parse_yaml(text, "here") == schema.parse_json(text, "here")
