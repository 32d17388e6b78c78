"""Finished work on disk, line by line, so that a run that was stopped can be resumed.

A file of JSON lines: the first states which run it belongs to, every further one is a result. A journal proves
nothing, it only saves time; its reader checks the contents of the lines. A line is complete once its newline is
written; anything after the last newline was cut short and is overwritten.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from crossval.errors import BadInputError
from crossval.receipts.file import canonical_json
from crossval.schema import parse_json

MAX_LINE_BYTES = 64 << 20


class Journal:
    """A journal of one run, locked; use as a context manager. Read all entries, then append."""

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        """Open the journal of the run that ``header`` identifies, or start one.

        Raises:
            BadInputError: it cannot be written, another process writes it, or it belongs to another run.
        """
        self.path = Path(path)
        self._end = 0
        """Offset of the end of the last good line."""
        self._number = 0
        self._exhausted = False
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        self._reader = os.fdopen(self._file, "rb", closefd=False)
        try:
            self._lock()
            self._begin(dict(header))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        if self._file >= 0:
            self._reader.close()
            os.close(self._file)
            self._file = -1

    def _unusable(self, error: OSError) -> BadInputError:
        return BadInputError(f"cannot write journal {self.path}: {error.strerror or error}")

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise BadInputError(f"cannot write journal {self.path}: not a regular file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInputError(f"journal {self.path} is being written by another process") from error

    def _begin(self, header: dict[str, Any]) -> None:
        expected = _line("run", header)
        first = self._readline()
        if not first.endswith(b"\n"):
            # Nothing, or the beginning of exactly this line; anything else is another file and is left alone.
            if not expected.startswith(first):
                raise BadInputError(f"{self.path}:1: not the journal of a run")
            self._exhausted = True
            self._append("run", header)
            return
        found = self._parse(first, "run")
        name = _first_difference(found, header)
        if name is not None:
            raise BadInputError(f"journal {self.path} belongs to another run: {name}; give another file")

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every complete entry with its place for messages (``file:line``).

        Raises:
            BadInputError: a complete line is malformed.
        """
        while not self._exhausted:
            line = self._readline()
            if not line.endswith(b"\n"):
                self._exhausted = True
                return
            yield f"{self.path}:{self._number + 1}", self._parse(line, "entry")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry and flush it to disk; an incomplete last line is overwritten.

        Raises:
            BadInputError: it cannot be written, or is not JSON.
        """
        if not self._exhausted:
            raise ValueError("read all entries before appending")
        self._append("entry", dict(entry))

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        line = _line(kind, content)
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            raise self._unusable(error) from error
        self._accept(line)

    def _accept(self, line: bytes) -> None:
        self._end += len(line)
        self._number += 1

    def _readline(self) -> bytes:
        try:
            line = self._reader.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise BadInputError(f"cannot read journal {self.path}: {error.strerror or error}") from error
        if len(line) > MAX_LINE_BYTES:
            raise BadInputError(f"{self.path}:{self._number + 1}: longer than {MAX_LINE_BYTES} bytes")
        return line

    def _parse(self, line: bytes, kind: str) -> dict[str, Any]:
        where = f"{self.path}:{self._number + 1}"
        data = parse_json(line[:-1], where)
        content = data.get(kind) if isinstance(data, dict) else None
        if not isinstance(content, dict):
            raise BadInputError(f"{where}: not a line of a journal: expected an object with {kind!r}")
        if line != _line(kind, content):
            raise BadInputError(
                f"{where}: not a line of a journal: its JSON is not canonical, or it has further fields"
            )
        self._accept(line)
        return content


def _line(kind: str, content: dict[str, Any]) -> bytes:
    return canonical_json({kind: content}) + b"\n"


def _first_difference(found: Any, expected: Any, name: str = "") -> str | None:
    """Describe the first difference; None when there is none."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            what = _first_difference(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
            if what is not None:
                return what
        return None
    if canonical_json(found) == canonical_json(expected):
        return None
    return f"{name} is {_show(found)} there, {_show(expected)} here"


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
