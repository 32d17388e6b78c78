"""The documentation builds as a site without a warning, and its workflow files are valid."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tools.site_links import on_page_markdown

ROOT = Path(__file__).parents[3]
SCRIPTS = Path(sysconfig.get_path("scripts"))


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [SCRIPTS / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    assert pages <= {path.stem for path in tmp_path.glob("*.html")}
    assert 'src="http' not in (tmp_path / "tutorial.html").read_text(encoding="utf-8")


def test_links_out_of_the_site_show_the_path() -> None:
    assert on_page_markdown("see [the schema](../schemas/a.json#x).") == "see the schema (`schemas/a.json`)."
    assert on_page_markdown("see [`tools/b.py`](../tools/b.py), [c](c.md#d)") == "see `tools/b.py`, [c](c.md#d)"


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-actions", "action.yml"), ("vendor.github-workflows", ".github/workflows/parity.yml")],
)
def test_github_files_are_valid(schema: str, file: str) -> None:
    command = [SCRIPTS / "check-jsonschema", "--builtin-schema", schema, ROOT / file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
