"""The support matrix has a row for every model that is tried, and says of none that bits differ."""

from __future__ import annotations

from pathlib import Path

from tests.support_matrix import SECTIONS, header

PAGE = Path(__file__).parents[3] / "docs" / "matrix.md"


def test_the_page_has_every_row_and_no_difference() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(header())
    lines = page.splitlines()
    found = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    assert [(row[0].strip("`"), row[1]) for row in found] == [
        (arch, what) for rows in SECTIONS.values() for arch, what, _ in rows()
    ]
    assert {cell for row in found for cell in row[2:]} == {"equal", "equal, its graph", "not run"}
    assert all(len(row) >= 4 and "equal" in row[2:] for row in found)
