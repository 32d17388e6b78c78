"""Commands on the tiny model, by default with the recorded reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.support.strangers import PROMPT, run

Layers = Callable[..., Result]


@pytest.fixture
def layers(model_path: Path, golden: Path) -> Layers:
    """Return ``layers(*options, prompt=, model=, reference=)``, which runs ``crossval layers``."""

    def command(*options: str | Path, prompt: str = PROMPT, model: Path = model_path, reference=golden) -> Result:
        return run("layers", "--prompt", prompt, "--model", model, "--reference", reference, *options)

    return command


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the receipt goes."""
    return tmp_path / "r.json"
