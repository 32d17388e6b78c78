"""A file of live tests without the marker would find no live engine, and be skipped wherever it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

PARITY = Path(__file__).parents[2] / "parity"


@pytest.mark.parametrize("path", sorted(PARITY.glob("*_live.py")), ids=lambda path: path.name)
def test_live_files_have_the_marker(path: Path) -> None:
    assert "pytest.mark.live" in path.read_text(encoding="utf-8")
