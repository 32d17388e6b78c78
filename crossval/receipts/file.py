"""Receipts on disk: canonical JSON, digest, schema, reading and writing (docs/receipts.md).

``kind`` builds a receipt; ``gate`` judges one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossval.errors import BadInputError
from crossval.files import STREAM, read_limited, write_atomically
from crossval.receipts import columns
from crossval.receipts.frames import MAIN, frames
from crossval.schema import one_line, parse_json, validate

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
MAX_SIZE_BYTES = 32 << 20
COMPRESSED = ".gz"
"""Ending of a file name with which a receipt is written in the gzip format; reading asks the file itself."""
_GZIP = b"\x1f\x8b"


class Receipt(dict[str, Any]):
    """The result of a command: the JSON object as in the file (docs/receipts.md), and its tables."""

    @property
    def kind(self) -> str:
        """Name of the kind of receipt: ``layers``, ``greedy``, ``bench`` and others."""
        return str(self["kind"])

    @property
    def verdict(self) -> str:
        """The verdict as stated; ``crossval.judge`` recomputes it."""
        return str(self["verdict"])

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return all tables of the receipt by name (``receipts.frames``)."""
        return frames(self)

    def frame(self, table: str | None = None) -> pd.DataFrame:
        """Return one table of the receipt; by default the main table of its kind.

        Raises:
            KeyError: the receipt has no such table, or none at all.
        """
        found = self.frames()
        if table is None:
            table = MAIN.get(self.kind, "rows")
        if table not in found:
            raise KeyError(f"no table {table!r}; this {self.kind} receipt has {', '.join(found) or 'none'}")
        return found[table]

    def save(self, path: str | Path) -> None:
        """Write the receipt as JSON, atomically, compressed if ``path`` ends in ``.gz``.

        Raises:
            BadInputError: the path cannot be written, or names something that is not a regular file.
        """
        write(path, self)


def canonical_json(value: Any) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no whitespace, UTF-8, shortest float digits.

    Floats are written as Python's ``repr`` does (the shortest decimal that reads back as the same binary64).

    Raises:
        BadInputError: the value holds NaN, an infinity, a lone surrogate or something that is not JSON.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInputError(f"cannot be written as canonical JSON: {one_line(error)}") from error


def digest(receipt: Mapping[str, Any]) -> str:
    """Return the sha256 (hexadecimal) over the canonical JSON of the receipt without its ``digest`` field."""
    return hashlib.sha256(canonical_json({k: v for k, v in receipt.items() if k != "digest"})).hexdigest()


def seal(receipt: Mapping[str, Any]) -> Receipt:
    """Return a copy of the receipt with its digest filled in, valid by the schema.

    Raises:
        BadInputError: the receipt violates the schema (a bug in the writer, caught before it is published).
    """
    sealed = Receipt({**receipt, "digest": digest(receipt)})
    validate(sealed)
    return sealed


def write(path: str | Path, receipt: Mapping[str, Any]) -> None:
    """Write a sealed receipt as JSON, its tables by column (``receipts.columns``), atomically; ``-``: to stdout.

    The same receipt makes the same bytes, compressed (a name that ends in ``.gz``) or not.

    Raises:
        BadInputError: the path cannot be written, or names something that is not a regular file.
    """
    file = Path(path)
    try:
        if file != STREAM and file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise BadInputError(f"cannot write the receipt to {file}: not a regular file")
        data = columns.to_text(receipt).encode("utf-8")
        write_atomically(file, gzip.compress(data, mtime=0) if file.suffix == COMPRESSED else data)
    except OSError as error:
        raise BadInputError(f"cannot write the receipt to {file}: {error.strerror or error}") from error


def to_text(receipt: Mapping[str, Any]) -> str:
    """Return the receipt as indented JSON for people to read, with one newline at the end."""
    return json.dumps(receipt, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: str | Path) -> Receipt:
    """Return the receipt in a file, valid by the schema; its digest and statuses are not checked here.

    Raises:
        BadInputError: unreadable, larger than 32 MiB, not JSON, duplicate keys, NaN, a malformed table, or invalid
        by the schema.
    """
    file = Path(path)
    data = read_bytes(file)
    receipt = columns.unpack(parse_json(data, str(file)), len(data), str(file))
    validate(receipt, str(file))
    return Receipt(receipt)


def read_bytes(path: Path, what: str = "receipt") -> bytes:
    """Return the JSON text in a receipt's file, decompressed if the file is in the gzip format.

    Raises:
        BadInputError: unreadable, damaged, or larger than 32 MiB, before or after.
    """
    data = read_limited(path, what, MAX_SIZE_BYTES)
    if not data.startswith(_GZIP):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(MAX_SIZE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInputError(f"{path}: damaged gzip file: {one_line(error)}") from error
    if len(text) > MAX_SIZE_BYTES:
        raise BadInputError(f"{path}: larger than {MAX_SIZE_BYTES} bytes when decompressed")
    return text


def in_folder(folder: Path) -> list[Path]:
    """Return the files below a folder whose names are those of receipts, ``.json`` and ``.json.gz``, sorted."""
    return sorted([*folder.rglob("*.json"), *folder.rglob(f"*.json{COMPRESSED}")])
