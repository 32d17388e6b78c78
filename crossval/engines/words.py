"""The words that name an engine, on either side of a comparison: ``NAME``, ``NAME:PATH``, or a directory.

``PATH`` is a library, a build directory or a source checkout; a directory without a name before it holds a trace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from crossval.errors import BadInputError

TRACE = "DIR"
"""Stands for a trace directory where words are listed."""
PATH = "PATH"
_SAYS_NOTHING = re.compile(r"|lib|bin|build|libllama\.so.*")
"""Parts of a path that every build has."""


@dataclass(frozen=True)
class EngineWord:
    """An engine as it was asked for: its name, or ``TRACE``, and the path that says which build or trace."""

    text: str
    """As typed."""
    name: str
    path: str | None = None

    @property
    def plain(self) -> str:
        """The word as receipts state it: of a path only one part, so that no folder of a machine shows."""
        if self.path is None:
            return self.name
        path = Path(os.path.abspath(self.path))
        if self.name == TRACE:
            return path.name or "/"
        telling = (one for one in (path, *path.parents) if not _SAYS_NOTHING.fullmatch(one.name))
        return f"{self.name}:{next(telling, path).name}"


def parse(
    text: str, names: Collection[str], takes: Mapping[str, str], what: str, *, traces: bool = True
) -> EngineWord:
    """Return the engine that a text names.

    ``names``: those accepted; ``takes``: what may follow some of them, after a colon; ``what``: the side, for
    messages; ``traces``: whether a directory with a trace will do.

    Raises:
        BadInputError: it is neither of the names nor a directory, or its path is missing or not accepted.
    """
    name, colon, path = text.partition(":")
    if not colon and name in names:
        return EngineWord(text, name)
    if colon and name in names:
        if name not in takes:
            raise BadInputError(f"{what} {text!r}: {name} takes no path")
        if not path:
            which = ", a library, a build or its source" if takes[name] == PATH else ""
            raise BadInputError(f"{what} {text!r}: expected {name}:{takes[name]}{which}")
        return EngineWord(text, name, os.path.expanduser(path))
    if traces and text and Path(text).is_dir():
        return EngineWord(text, TRACE, text)
    hint = ""
    libraries = sorted(name for name, taken in takes.items() if taken == PATH)
    if text and Path(text).is_file() and libraries:
        hint = f"; write {libraries[0]}:{text} if it is a library"
    listed = [shown(name, takes) for name in names] + (["a directory with a trace"] if traces else [])
    raise BadInputError(f"{what} {text!r} is neither {', '.join(listed[:-1])} nor {listed[-1]}{hint}")


def shown(name: str, takes: Mapping[str, str]) -> str:
    """Return a name as it is listed, with what may follow it."""
    return f"{name}[:{takes[name]}]" if name in takes else name
