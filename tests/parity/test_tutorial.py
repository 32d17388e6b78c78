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
COMMANDS = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)).splitlines()
SHOWN = [block.splitlines() for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)]
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
            assert set(next(shown)) <= {line.rstrip() for line in done.stdout.splitlines()}
    assert next(shown, None) is None
    assert COMMANDS[0].startswith("bitnet run")
    assert len(COMMANDS) == 4
