"""Mutation of JSON values: what byte by byte almost never gives is another valid text."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, 2.0, 1e-300, 1e38, 1e39, 1e100, 1e308, -1e308),
    *(63, 64, 255, 256, 65535, 65536, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 63, 1 << 64, 10**99),
    *(
        "",
        "a",
        "\x1b[0m",
        "\n",
        "\u2028",
        "\ud800",
        "[/]",
        "[red]",
        "%s",
        "{i}",
        "0" * 64,
        "x" * 301,
        "null",
        "blk.0.q",
    ),
    *([], {}, [[]], [0], [None], {"": 0}, [1, 1], ["a", "a"], {"$rows": 2, "fields": {"a": {"same": 1}}}),
)
"""Values that readers meet rarely."""
_MOST_NODES = 20_000


def mutated(data: bytes, max_size: int, choices: random.Random) -> bytes | None:
    """Return a JSON text (or JSON lines) with some values changed; None: it is none, or would be too long."""
    text = data.decode("utf-8", "replace")
    lines = text.split("\n") if _parsed(text) is _NONE else [text]
    at = choices.randrange(len(lines))
    value = _parsed(lines[at])
    if value is _NONE:
        return None
    root = [value]
    for _ in range(choices.randint(1, 4)):
        _change(root, choices)
    try:
        lines[at] = json.dumps(root[0], ensure_ascii=choices.random() < 0.5)
        made = "\n".join(lines).encode("utf-8", "replace")
    except (RecursionError, ValueError):
        return None
    return made if len(made) <= max_size else None


_NONE = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NONE


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Return every value as what holds it and its key there."""
    found: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in found:
        item = holder[key]
        if isinstance(item, dict):
            found += [(item, name) for name in item]
        elif isinstance(item, list):
            found += [(item, index) for index in range(len(item))]
        if len(found) > _MOST_NODES:
            break
    return found


def _change(root: list[Any], choices: random.Random) -> None:
    places = _places(root)
    holder, key = choices.choice(places)
    item = holder[key]
    kind = choices.randrange(7)
    if kind == 0:
        holder[key] = copy.deepcopy(choices.choice(ODD))
    elif kind == 1:  # another value of the same text
        other, name = choices.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and holder is not root:
        del holder[key]
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(item))
    elif kind == 4 and isinstance(holder, dict):
        name = choices.choice([choices.choice(list(holder)), str(key)[:-1], f"{key}x", "$rows"])
        holder[name] = holder.pop(key)
    elif kind == 5 and isinstance(item, (int, float)):
        small = item if abs(item) < 1e300 else 0  # of larger integers there is no float
        holder[key] = choices.choice([-item, item + 1, item - 1, item * 2, small / 2, float(small)])
    elif kind == 6 and isinstance(item, str):
        at = choices.randint(0, len(item))
        part = choices.choice(ODD)
        holder[key] = item[:at] + (part if isinstance(part, str) else "") + item[at + choices.randrange(3) :]
    else:
        holder[key] = copy.deepcopy(choices.choice(ODD))
