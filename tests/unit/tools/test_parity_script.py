"""``tools/ci/parity.sh``, as action.yml runs it: away from the checkout, with another home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]


def run(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", **settings}
    command = ["bash", str(ROOT / "tools/ci/parity.sh")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.long
def test_parity_leaves_receipts_a_page_and_what_ci_shows(tmp_path: Path) -> None:
    done = run(tmp_path, PARITY_STEPS="2", GITHUB_STEP_SUMMARY=str(tmp_path / "step.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "parity"
    names = {path.name for path in out.iterdir()}
    assert names == {"layers.json", "greedy.json", "junit.xml", "summary.md", "badge.txt", "report.html"}
    assert (tmp_path / "step.md").read_text() == (out / "summary.md").read_text()
    assert len(ElementTree.parse(out / "junit.xml").getroot()) == 2
    assert json.loads((out / "badge.txt").read_text())["message"] == "passing"
    assert "::error" not in done.stdout


@pytest.mark.long
def test_a_defect_fails_the_job_with_a_page_and_annotations(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples/garbage-engine", tmp_path / "trace")
    done = run(tmp_path, PARITY_CANDIDATE="trace", PARITY_STEPS="0", GITHUB_ACTIONS="true")
    assert done.returncode == 1
    out = tmp_path / "parity"
    assert "CANDIDATE_DEFECT" in (out / "report.html").read_text(encoding="utf-8")
    errors = [line for line in done.stdout.splitlines() if line.startswith("::error file=parity/layers.json")]
    assert errors
    assert json.loads((out / "badge.txt").read_text())["message"] == "failing"
    assert "1 of 1" not in (out / "summary.md").read_text()


def test_the_action_runs_this_script_with_the_inputs_it_describes() -> None:
    action = (ROOT / "action.yml").read_text(encoding="utf-8")
    script = (ROOT / "tools/ci/parity.sh").read_text(encoding="utf-8")
    for name in ("MODEL", "PROMPT", "CANDIDATE", "REFERENCE", "STEPS", "GATE"):
        assert f"PARITY_{name}: ${{{{ inputs.{name.lower()} }}}}" in action
        assert f"PARITY_{name}" in script
