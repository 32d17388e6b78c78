"""What messages say about getting bitnet.cpp: only what is there to be run."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from crossval.bitnet_cpp import remedies

ROOT = Path(__file__).parents[3]


def test_a_checkout_has_a_make_target_and_an_installation_a_module(tmp_path):
    assert remedies.build_command(tmp_path) == "python -m crossval.bitnet_cpp.build"
    assert importlib.util.find_spec("crossval.bitnet_cpp.build") is not None
    (tmp_path / "Makefile").write_text("")
    assert remedies.build_command(tmp_path) == "make fetch-cpp"
    assert "\nfetch-cpp:" in (ROOT / "Makefile").read_text()


def test_no_message_names_the_target_by_itself():
    """What is installed with pip has no Makefile."""
    known = {"remedies.py", "build.py", "library.py", "source.py"}
    named = [path for path in (ROOT / "crossval").rglob("*.py") if "make fetch-cpp" in path.read_text()]
    assert {path.name for path in named} <= known
    for name in ("build.py", "library.py"):
        text = (ROOT / "crossval" / "bitnet_cpp" / name).read_text()
        assert '"make fetch-cpp' not in text
        assert "run `make fetch-cpp" not in text
