"""What llama.cpp's ``llama-eval-callback`` and ``llama-debug`` print: each tensor's corner values, four decimals.

Of every axis longer than six, the first three and the last three indices are printed (``ggml_print_tensor`` in
``examples/eval-callback/eval-callback.cpp``; ``common_debug_print_tensor`` in ``common/debug.cpp``); the sum below
them is of all values in one generation and of the printed ones in the other, and is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crossval.errors import BadInputError

SHOWN = 3
"""Indices printed at either end of a long axis."""
DECIMALS = 4
MAX_VALUES = 1 << 26
"""Largest tensor that is taken in."""
_HEAD = re.compile(
    r"(?:ggml_debug|common_debug_cb_eval): +(?P<node>\S.*?) = \((?P<type>\w+)\) +(?P<op>\w+)\(.*\) = "
    r"\{(?P<ne>\d{1,9}, \d{1,9}, \d{1,9}, \d{1,9})\}\s*$"
)
_NUMBER = re.compile(r"-?(?:\d+\.\d{4}\b|nan|inf)")


@dataclass(frozen=True)
class Printed:
    """One printed tensor. Arrays are shaped ``(ne3, ne2, ne1, ne0)``, slowest axis first."""

    node: str
    op: str
    values: npt.NDArray[np.float32]
    """The printed ones in their places."""
    known: npt.NDArray[np.bool_]
    """Which were printed."""


def parse(text: str, where: str) -> Iterator[Printed]:
    """Yield the float32 tensors of a dump in the order in which they were computed.

    Raises:
        BadInputError: no tensor, or one that is cut off or of an unreasonable size.
    """
    found, head = False, None
    rows: list[list[str]] = []
    for line in (*text.splitlines(), None):
        start = None if line is None else _HEAD.search(line)
        if line is None or start is not None:
            if head is not None and head["type"] == "f32":
                yield _tensor(head, rows, where)
            head, rows = start, []
            found = found or start is not None
        elif head is not None and "sum" not in line:
            numbers = _NUMBER.findall(line)
            rows += [numbers] if numbers else []
    if not found:
        raise BadInputError(f"{where}: no tensor of llama-eval-callback or llama-debug is printed here")


def _tensor(head: re.Match[str], rows: list[list[str]], where: str) -> Printed:
    shape = tuple(map(int, reversed(head["ne"].split(", "))))
    if not 0 < math.prod(shape) <= MAX_VALUES:
        raise BadInputError(f"{where}: {head['node']} has the shape {shape}")
    places = [_printed(length) for length in shape[1:]]
    n_rows, width = shape[0] * len(places[0]) * len(places[1]), len(places[2])
    if len(rows) != n_rows or any(len(row) != width for row in rows):
        raise BadInputError(
            f"{where}: {head['node']} is not printed whole: {len(rows)} rows of {sum(map(len, rows))} values, "
            f"expected {n_rows} of {width} each"
        )
    at = np.ix_(range(shape[0]), *places)
    values, known = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    values[at] = np.array(rows, np.float32).reshape([shape[0], *map(len, places)])
    known[at] = True
    return Printed(head["node"], head["op"], values, known)


def _printed(length: int) -> list[int]:
    """Return the indices of an axis that are printed."""
    every = range(length)
    return [*every] if length <= 2 * SHOWN else [*every[:SHOWN], *every[-SHOWN:]]
