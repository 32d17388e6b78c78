"""The tutorial's commands, in order, give what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
FIRST, *REST = [text.splitlines() for language, text in BLOCKS if language == "sh"]
COMMANDS = [command for block in REST for command in block]
SHOWN = [text.splitlines() for language, text in BLOCKS if not language]
FRACTION = re.compile(r"-?[0-9]+\.[0-9]+(e[+-][0-9]+)?")
"""Measured values: their last digits are those of the machine's NumPy."""
WRONG = 1
"""Exit code of `crossval layers` on a broken engine."""


@pytest.mark.long
def test_the_tutorial_leads_to_the_mistake(tmp_path: Path) -> None:
    for name in ("examples", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    shown = iter(SHOWN)
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        layers = command.startswith("crossval layers")
        assert done.returncode == (WRONG if layers else 0), f"{command}\n{done.stdout}{done.stderr}"
        if layers:
            printed = {FRACTION.sub("#", line.rstrip()) for line in done.stdout.splitlines()}
            assert {FRACTION.sub("#", line) for line in next(shown)} <= printed
    assert next(shown, None) is None
    assert FIRST[-1] == "pip install ."  # run by tools/ci/tutorial.sh, in a clone
    assert COMMANDS[0].startswith("bitnet run")
    assert len(COMMANDS) == 4
