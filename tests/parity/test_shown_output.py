"""The output shown in README.md and docs/output.md is what the command prints, except for kernel and folders."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

from tests.support.native_build import ROOT
from tests.zoo.engine import run

PROGRESS = re.compile(r"[^:]+: \d+ of \d+, \d+ s")
LAYERS = [Path(sysconfig.get_path("scripts")) / "crossval", "layers", "--prompt", "What is 2+2?"]


def blocks(page: str) -> list[list[str]]:
    """Return the lines of each fenced block of a page."""
    return [plain(block) for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)]


def plain(text: str) -> list[str]:
    text = re.sub(r"kernel \w+", "kernel", text.replace(f"{ROOT}/", ""))
    text = re.sub(r"BITNET_LIBRARY=\S*/", "BITNET_LIBRARY=", text)
    return [line.rstrip() for line in text.rstrip().splitlines() if not PROGRESS.fullmatch(line.rstrip())]


def test_the_readme_shows_what_the_demo_prints(tmp_path: Path) -> None:
    made = tmp_path / "demo-receipt.json"
    done = subprocess.run([*LAYERS, "--receipt", made], capture_output=True, text=True, check=True, timeout=240)
    (command, *shown, receipt), *_ = blocks("README.md")
    assert (command, receipt) == ("$ make demo", "receipt: build/demo-receipt.json")
    assert [*shown, f"receipt: {made}"] == plain(done.stdout)
    assert made.stat().st_size <= 25_000


def test_the_output_page_shows_what_a_broken_engine_gives(golden: Path) -> None:
    done = run([*LAYERS, "--reference", golden], "sub-norm-skipped:layer=2:op=attn_sub_norm")
    shown, *_ = blocks("docs/output.md")
    assert (done.returncode, shown) == (1, plain(done.stdout + done.stderr))
    assert set(blocks("README.md")[2]) <= set(shown)
