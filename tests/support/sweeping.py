"""What tests of sweeps share: cells in this process, each comparison made once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bitnet_py import _native
from crossval.receipts import file
from crossval.sweep import job, summary
from tests.support.strangers import run

KERNELS = [family.name for family in _native.kernel_families() if family.available][-2:]
PROMPTS = ("Hello there", "Where is it?")
GATE = ("--reference-name", "specification")
Asked = list[Sequence[str]]


def in_process(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
    """Do what ``job.run`` does, but in this process, and the same only once."""
    return _once(tuple(arguments), tuple(sorted(environment.items())))


@functools.cache
def _once(arguments: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> job.Outcome:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment:
            patch.setenv(name, value)
        done = run(*arguments)
    return job.Outcome(done.exit_code, done.stdout_bytes, done.stderr.strip().removeprefix("error: "))


def written(folder: Path) -> file.Receipt:
    return summary.read(folder / "out" / summary.NAME)


def stable(made: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without what differs between two runs of the same: times, and digests over them."""
    rows = [{**row, "digest": None} for row in made["rows"]]
    return {**made, "rows": rows, "created_at": None, "digest": None}
