"""How a receipt is laid out in its file: tables by column, and what people look for first.

A list of objects with the same keys is written as one object: ``$rows`` is their number, ``fields`` has
one column for each key. A column is a list with one value per row, ``{"same": value}``, or, of
objects, ``fields`` again with the rows that are null (``null``). The receipt itself, and so its schema and
its digest, knows nothing of it (docs/receipts.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from crossval.errors import BadInputError

ROWS = "$rows"
MAX_CELLS = 1 << 23
"""Cells of all tables of one file: a few bytes can state a table of any size."""
MAX_ROWS = 1 << 20
"""Rows of all of them; each is an object of 230 bytes and more."""
FEW_ROWS = 1 << 12
"""So many may be alike. Beyond, rows that differ take two bytes of the file each, in one column at least."""
FIRST = ("schema_version", "kind", "verdict", "parity", "coverage", "first_divergence", "diagnosis", "notes")
"""Fields that lead the file; the others follow by name."""
_LINE = 100


def to_text(receipt: Mapping[str, Any]) -> str:
    """Return the text of a receipt's file, with one newline at the end; ``unpack`` of its JSON is the receipt.

    Raises:
        ValueError: NaN or an infinity, which are not JSON, or the key ``$rows``.
    """
    order = [key for key in FIRST if key in receipt] + sorted(set(receipt) - set(FIRST))
    return _layout({key: _pack(receipt[key]) for key in order}) + "\n"


def unpack(value: Any, size_bytes: int, where: str) -> Any:
    """Return the receipt that a file of this size states; one without tables is returned as it is.

    Raises:
        BadInputError: a malformed table, tables of more than ``MAX_CELLS`` cells or ``MAX_ROWS``
        rows, or of more rows than differ in a file of this size; the message starts with ``where``.
    """
    try:
        return _Unpacker(min(MAX_ROWS, max(FEW_ROWS, size_bytes // 2))).value(value)
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error


def _pack(value: Any) -> Any:
    if isinstance(value, Mapping):
        if ROWS in value:
            raise ValueError(f"the key {ROWS} is reserved for tables")
        return {key: _pack(item) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) > 1 and _alike(value) and not any(ROWS in row for row in value):
        return {ROWS: len(value), "fields": _fields(value)}
    return [_pack(item) for item in value]


def _alike(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, Mapping) and row and row.keys() == rows[0].keys() for row in rows)


def _fields(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: _column([row[key] for row in rows]) for key in sorted(rows[0])}


def _column(values: Sequence[Any]) -> Any:
    first = values[0]
    # 1, 1.0 and true are equal to Python, and so are 0.0 and -0.0.
    if not isinstance(first, (Mapping, list, tuple)) and all(
        type(value) is type(first) and repr(value) == repr(first) for value in values
    ):
        return {"same": first}
    objects = [value for value in values if value is not None]
    if _alike(objects):
        return {
            "fields": _fields(objects),
            "null": [row for row, value in enumerate(values) if value is None],
        }
    return [_pack(value) for value in values]


class _Unpacker:
    """Unpacks the value of one file, counting rows and cells of its tables."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.n_rows = self.n_cells = 0

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        if ROWS not in value:
            return {key: self.value(item) for key, item in value.items()}
        n_rows = value[ROWS]
        if value.keys() != {ROWS, "fields"} or type(n_rows) is not int or n_rows < 0:
            raise ValueError(f"a table has the number of its rows in {ROWS}, and its fields")
        return self.rows(value["fields"], n_rows)

    def rows(self, fields: Any, n_rows: int) -> list[dict[str, Any]]:
        if not isinstance(fields, dict) or not fields:
            raise ValueError("the fields of a table are an object with at least one column")
        self.n_rows += n_rows
        self.n_cells += n_rows * len(fields)
        if self.n_rows > self.max_rows or self.n_cells > MAX_CELLS:
            raise ValueError(f"tables of more than {self.max_rows} rows or {MAX_CELLS} cells")
        columns = [self.column(key, column, n_rows) for key, column in fields.items()]
        return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]

    def column(self, name: str, column: Any, n_rows: int) -> list[Any]:
        if isinstance(column, list) and len(column) == n_rows:
            return [self.value(item) for item in column]
        if isinstance(column, dict) and column.keys() == {"same"} and not isinstance(column["same"], (dict, list)):
            return [column["same"]] * n_rows
        if isinstance(column, dict) and column.keys() == {"fields", "null"}:
            nulls = column["null"]
            if (
                isinstance(nulls, list)
                and all(type(row) is int and 0 <= row < n_rows for row in nulls)
                and len(set(nulls)) == len(nulls)
            ):
                objects = iter(self.rows(column["fields"], n_rows - len(nulls)))
                absent = set(nulls)
                return [None if row in absent else next(objects) for row in range(n_rows)]
        raise ValueError(f"column {name[:80]!r} of a table does not give one value for each of {n_rows} rows")


def _layout(value: Any, depth: int = 0) -> str:
    """Return JSON with one line for what fits in one, and for each list that holds no objects."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if len(line) > _LINE and isinstance(value, Mapping):
        items = [f"{json.dumps(key)}: {_layout(item, depth + 1)}" for key, item in value.items()]
        opening, closing = "{}"
    elif len(line) > _LINE and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [_layout(item, depth + 1) for item in value]
        opening, closing = "[]"
    else:
        return line
    indent = "\n" + " " * depth
    return opening + ",".join(f"{indent} {item}" for item in items) + indent + closing
