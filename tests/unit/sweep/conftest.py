"""A small sweep, run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from crossval.sweep import job
from tests.support.strangers import run
from tests.support.sweeping import KERNELS, PROMPTS, Asked, in_process


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Run cells in this process; which, in order."""
    made: Asked = []

    def record(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
        made.append(arguments)
        return in_process(arguments, environment)

    monkeypatch.setattr(job, "run", record)
    return made


@pytest.fixture
def sweep(tmp_path: Path, model_path: Path) -> Callable[..., Result]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ("--models", model_path, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    chosen = [word for kernel in KERNELS for word in ("--kernels", kernel)]
    return lambda *more: run("sweep", *words, *chosen, "--reference", "spec", "--decode", "0", *more)
