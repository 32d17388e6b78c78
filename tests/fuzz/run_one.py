"""One input through one target: an answer or a documented refusal in bounded time and memory; else a crash."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.errors import BitnetError
from crossval.errors import BadInputError

MOST_CPU_S = 5.0
"""For one input, of at most ``MAX_BYTES`` bytes, instrumented."""
MOST_BYTES = 512 << 20
"""By which one input may raise the most memory that the process ever had."""
MAX_BYTES = 1 << 16

Refusals = tuple[type[Exception], ...]


class Unbounded(AssertionError):
    """One input took too much time or memory, or was refused in more than one line."""


@dataclass(frozen=True)
class Target:
    """A reader. ``read`` gets the bytes and a scratch folder, which exists and is its own."""

    read: Callable[[bytes, Path], None]
    refusals: Refusals
    """What it may raise, as its docstring says."""
    covers: tuple[str, ...]
    """Packages and modules whose branches guide the search."""
    json: bool = False
    """Its inputs are JSON texts: they are also mutated as values."""


@contextmanager
def refusable(refusals: Refusals = (BitnetError, BadInputError)) -> Iterator[None]:
    """Take a documented refusal for an answer, as long as it is one line."""
    try:
        yield
    except refusals as error:
        if len(str(error).splitlines()) > 1:
            raise Unbounded(f"{type(error).__name__} of {len(str(error).splitlines())} lines") from error


def run_one(target: Target, data: bytes, scratch: Path) -> None:
    """Run a target over one input.

    Raises:
        Unbounded: too much time, too much memory, or a refusal that is not one line.
        Exception: anything that the target may not raise.
    """
    before_s, before_bytes = time.process_time(), _peak_bytes()
    with refusable(target.refusals):
        target.read(data[:MAX_BYTES], scratch)
    spent_s, grown = time.process_time() - before_s, _peak_bytes() - before_bytes
    if spent_s > MOST_CPU_S:
        raise Unbounded(f"{spent_s:.1f} s for {len(data)} bytes")
    if grown > MOST_BYTES:
        raise Unbounded(f"{grown >> 20} MiB for {len(data)} bytes")


def fresh(scratch: Path, name: str, data: bytes) -> Path:
    """Write a new file: one that is still mapped must not be cut short."""
    path = scratch / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
