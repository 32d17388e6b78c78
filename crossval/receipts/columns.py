"""How a receipt is laid out in its file: tables by column, and what people look for first.

A list of objects with the same keys is written as one object: ``$rows`` is their number, ``fields`` has
one column for each key. A column is a list with one value per row, ``{"same": value}``, the different
values (``of``) with the number of each row's (``is``), or, of objects, ``fields`` again with the rows
that are null (``null``). A table that is almost another one
names that one (``like``, a path) and has only the columns that differ, or of those, the rows
(``but``). The receipt itself, and so its schema and its digest, knows nothing of it (docs/receipts.md).
"""

from __future__ import annotations

import json
import math
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
MAX_REPEATED_BYTES = 1 << 27
"""Text of all that a file states once and that is read many times, each time counted."""
FIRST = ("schema_version", "kind", "verdict", "parity", "coverage", "first_divergence", "diagnosis", "notes")
"""Fields that lead the file; the others follow by name."""
_WIDTH = 100


def to_text(receipt: Mapping[str, Any]) -> str:
    """Return the text of a receipt's file, with one newline at the end; ``unpack`` of its JSON is the receipt.

    Raises:
        ValueError: NaN or an infinity, which are not JSON, or the key ``$rows``.
    """
    order = [key for key in FIRST if key in receipt] + sorted(set(receipt) - set(FIRST))
    return _layout(_Packer().value({key: receipt[key] for key in order}, "")) + "\n"


def unpack(value: Any, size_bytes: int, where: str) -> Any:
    """Return the receipt that a file of this size states; one without tables is returned as it is.

    Raises:
        BadInputError: a malformed table, tables of more than ``MAX_CELLS`` cells or ``MAX_ROWS``
        rows, or of more rows than differ in a file of this size, or ``MAX_REPEATED_BYTES`` of
        repetition; the message starts with ``where``.
    """
    try:
        return _Unpacker(value, min(MAX_ROWS, max(FEW_ROWS, size_bytes // 2))).value(value)
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error


class _Packer:
    """Packs one receipt. Paths are keys and numbers joined by ``/``; within a table nothing has one (None)."""

    def __init__(self) -> None:
        self.written: dict[Any, tuple[str, Sequence[Mapping[str, Any]]]] = {}

    def value(self, value: Any, path: str | None = None) -> Any:
        if isinstance(value, Mapping):
            if ROWS in value:
                raise ValueError(f"the key {ROWS} is reserved for tables")
            return {key: self.value(item, _below(path, key)) for key, item in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        if len(value) > 1 and _alike(value) and not any(ROWS in row for row in value):
            return self.table(value, path)
        return [self.value(item, _below(path, at)) for at, item in enumerate(value)]

    def table(self, rows: Sequence[Mapping[str, Any]], path: str | None) -> dict[str, Any]:
        full = {ROWS: len(rows), "fields": self.fields(rows)}
        if path is None:
            return full
        other_path, other = self.written.setdefault((len(rows), frozenset(rows[0])), (path, rows))
        if other is rows:
            return full
        like = {ROWS: len(rows), "like": other_path, "fields": self.changes(rows, other)}
        return min(like, full, key=lambda table: len(_line(table)))

    def changes(self, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = {}
        for key in sorted(rows[0]):
            texts = zip((_line(row[key]) for row in rows), (_line(row[key]) for row in others), strict=True)
            # By their text: 1, 1.0 and true are equal to Python, and so are 0.0 and -0.0.
            differ = [at for at, (text, other) in enumerate(texts) if text != other]
            if differ:
                but = {"but": [[at, self.value(rows[at][key])] for at in differ]}
                columns[key] = min(but, self.column([row[key] for row in rows]), key=lambda item: len(_line(item)))
        return columns

    def fields(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {key: self.column([row[key] for row in rows]) for key in sorted(rows[0])}

    def column(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if not isinstance(first, (Mapping, list, tuple)) and len({_line(value) for value in values}) == 1:
            return {"same": first}
        objects = [value for value in values if value is not None]
        if _alike(objects):
            return {
                "fields": self.fields(objects),
                "null": [row for row, value in enumerate(values) if value is None],
            }
        full = [self.value(value) for value in values]
        if any(isinstance(value, (dict, list)) for value in full):
            return full
        texts = [_line(value) for value in full]
        different = dict(zip(texts, full, strict=True))
        numbers = {text: number for number, text in enumerate(different)}
        of = {"of": list(different.values()), "is": [numbers[text] for text in texts]}
        return min(full, of, key=lambda column: len(_line(column)))


def _below(path: str | None, key: str | int) -> str | None:
    return None if path is None or "/" in str(key) else f"{path}/{key}"


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _line(value: Any) -> str:
    """Return JSON on one line; of plain numbers without the encoder, which is made anew for every one."""
    if type(value) in (int, float) and math.isfinite(value):
        return repr(value)
    return _ENCODER.encode(value)


def _alike(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, Mapping) and row and row.keys() == rows[0].keys() for row in rows)


class _Unpacker:
    """Unpacks the value of one file, counting rows and cells of its tables."""

    def __init__(self, file: Any, max_rows: int) -> None:
        self.file, self.max_rows = file, max_rows
        self.n_rows = self.n_cells = self.n_repeated = self.n_within = 0

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        if ROWS not in value:
            return {key: self.value(item) for key, item in value.items()}
        n_rows = value[ROWS]
        if value.keys() - {"like"} != {ROWS, "fields"} or type(n_rows) is not int or n_rows < 0:
            raise ValueError(f"a table has the number of its rows in {ROWS}, and its fields")
        if "like" not in value:
            return self.rows(value["fields"], n_rows)
        if self.n_within:
            raise ValueError("a table within another cannot name one")
        return self.changed(self.value(self.named(value["like"], n_rows)), value["fields"])

    def named(self, path: Any, n_rows: int) -> dict[str, Any]:
        """Return the table of the file at a path that another one names."""
        found = self.file
        for key in path.split("/")[1:] if isinstance(path, str) else ():
            is_index = isinstance(found, list) and key.isdecimal() and len(key) < 8 and int(key) < len(found)
            found = found[int(key)] if is_index else found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict) or found.keys() != {ROWS, "fields"} or found[ROWS] != n_rows:
            raise ValueError(f"{str(path)[:80]!r} is not the path of a table of {n_rows} rows, written in full")
        self.repeat(len(_line(found)))
        return found

    def repeat(self, n_bytes: int) -> None:
        """Count what is repeated."""
        self.n_repeated += n_bytes
        if self.n_repeated > MAX_REPEATED_BYTES:
            raise ValueError(f"tables with more than {MAX_REPEATED_BYTES >> 20} MB of repetition")

    def changed(self, rows: list[dict[str, Any]], fields: Any) -> list[dict[str, Any]]:
        """Return rows with other columns, or other values in some rows of a column."""
        if not isinstance(fields, dict) or not rows or fields.keys() - rows[0].keys():
            raise ValueError("a table that names another has some of its fields")
        self.n_within += 1
        for key, column in fields.items():
            if isinstance(column, dict) and column.keys() == {"but"}:
                for at, value in self.pairs(column["but"], len(rows)):
                    rows[at][key] = self.value(value)
            else:
                for row, value in zip(rows, self.column(key, column, len(rows)), strict=True):
                    row[key] = value
        self.n_within -= 1
        return rows

    def pairs(self, pairs: Any, n_rows: int) -> list[Any]:
        if isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and 0 <= pair[0] < n_rows
            for pair in pairs
        ):
            return pairs
        raise ValueError(f"'but' of a column has pairs of a row, from 0 to {n_rows - 1}, and a value")

    def rows(self, fields: Any, n_rows: int) -> list[dict[str, Any]]:
        if not isinstance(fields, dict) or not fields:
            raise ValueError("the fields of a table are an object with at least one column")
        self.n_rows += n_rows
        self.n_cells += n_rows * len(fields)
        if self.n_rows > self.max_rows or self.n_cells > MAX_CELLS:
            raise ValueError(f"tables of more than {self.max_rows} rows or {MAX_CELLS} cells")
        self.n_within += 1
        columns = [self.column(key, column, n_rows) for key, column in fields.items()]
        self.n_within -= 1
        return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]

    def column(self, name: str, column: Any, n_rows: int) -> list[Any]:
        if isinstance(column, list) and len(column) == n_rows:
            return [self.value(item) for item in column]
        if isinstance(column, dict) and column.keys() == {"same"} and not isinstance(column["same"], (dict, list)):
            self.repeat(n_rows * len(_line(column["same"])))
            return [column["same"]] * n_rows
        if isinstance(column, dict) and column.keys() == {"of", "is"}:
            of, numbers = column["of"], column["is"]
            if (
                isinstance(of, list)
                and not any(isinstance(value, (dict, list)) for value in of)
                and isinstance(numbers, list)
                and len(numbers) == n_rows
                and all(type(number) is int and 0 <= number < len(of) for number in numbers)
            ):
                sizes = [len(_line(value)) for value in of]
                self.repeat(sum(sizes[number] for number in numbers))
                return [of[number] for number in numbers]
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
    line = _line(value)
    if len(line) > _WIDTH and isinstance(value, Mapping):
        items = [f"{json.dumps(key)}: {_layout(item, depth + 1)}" for key, item in value.items()]
        opening, closing = "{}"
    elif len(line) > _WIDTH and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [_layout(item, depth + 1) for item in value]
        opening, closing = "[]"
    else:
        return line
    indent = "\n" + " " * depth
    return opening + ",".join(f"{indent} {item}" for item in items) + indent + closing
