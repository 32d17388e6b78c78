"""YAML as strict as our JSON: plain values, no duplicate keys, no anchors or tags, limits before work.

Scalars are JSON's (YAML 1.2's core schema): ``no`` is a text, ``1e-6`` a number, dates are texts.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from crossval.errors import BadInputError
from crossval.schema import MAX_DEPTH, MAX_DIGITS, one_line

MAX_YAML_BYTES = 128 << 10
"""Reading YAML is some hundred times slower than JSON: what is larger is written as JSON."""


class _Loader(yaml.SafeLoader):
    """Builds plain values from a checked text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as in the base class


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"-?(0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", list("-0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(data: bytes, where: str) -> Any:
    """Parse YAML strictly: UTF-8, one document, mappings with texts as keys, lists, and JSON's scalars.

    Raises:
        BadInputError: anything else, larger than ``MAX_YAML_BYTES``, or deeper than ``MAX_DEPTH``; the message
        starts with ``where``.
    """
    if len(data) > MAX_YAML_BYTES:
        raise BadInputError(f"{where}: YAML of more than {MAX_YAML_BYTES} bytes; write it as JSON")
    try:
        text = data.decode("utf-8")
        _check_events(text)
        loader = _Loader(text)
        try:
            return _value(loader.get_single_node())
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not valid YAML: {one_line(error)}") from error


def _check_events(text: str) -> None:
    """Refuse, before anything is built, what nests too deeply or stands for something else."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("anchors and aliases are not accepted")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"tags are not accepted: {tag[:80]}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _value(node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key, item in node.value:
            name = _value(key)
            if not isinstance(name, str):
                raise ValueError(f"a key that is no text: {one_line(name, 80)}")
            if name in made:
                raise ValueError(f"duplicate key {name[:80]!r}")
            made[name] = _value(item)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return None
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind in ("int", "float"):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"number out of range: {text[:40]}…")
        number = int(text) if kind == "int" else float(text)
        if not math.isfinite(number):
            raise ValueError(f"number out of range: {text[:40]}")
        return number
    return {"null": None, "bool": text == "true"}.get(kind, text)
