"""docs/pytorch.md is followed as written, from an empty folder to a verdict; only the installation is left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.support.torch_models import need

need("torch", "transformers")

PAGE = (Path(__file__).parents[3] / "docs" / "pytorch.md").read_text(encoding="utf-8")
MARKED = dict(re.findall(r"<!-- pytorch: ([\w.]+) -->\n```\w*\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^    ((?:python|crossval) .*(?:record_mine|my-trace).*)$", PAGE, re.M)
TEN_MINUTES = 600


def followed(folder: Path, script: str) -> str:
    """Write the script, run the commands and return what they print."""
    (folder / "record_mine.py").write_text(script, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "200"}
    printed = ""
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1), done.stderr
        printed += done.stdout + done.stderr
    return printed


def assert_shown(promised: str, printed: str) -> None:
    """Check that the words of every promised line are printed in one line."""
    for line in promised.strip().splitlines():
        pattern = r"[^\n]*?".join(re.escape(part) for part in line.split())
        assert re.search(pattern, printed), (line, printed)


def test_the_page_leads_to_a_verdict_and_to_the_fault(tmp_path: Path) -> None:
    assert len(COMMANDS) == 2
    begun = time.monotonic()
    (tmp_path / "right").mkdir()
    assert_shown(MARKED["right"], followed(tmp_path / "right", MARKED["record_mine.py"]))
    assert time.monotonic() - begun < TEN_MINUTES
    (tmp_path / "wrong").mkdir()
    script = MARKED["record_mine.py"].replace("\nrecord(", f"\n{MARKED['fault']}record(")
    assert_shown(MARKED["wrong"], followed(tmp_path / "wrong", script))
