"""The C library under the sanitizers; `make sanitize tsan valgrind` also proves that they see what is broken."""

from __future__ import annotations

import pytest

from tests.checked_library import CHECKS, MissingTool, require_tools, run

QUICK = ("sanitize", "tsan")


@pytest.mark.parametrize("name", QUICK)
def test_c_library_passes(name, tmp_path):
    check = CHECKS[name]
    try:
        require_tools(check, tmp_path)
    except MissingTool as error:
        pytest.skip(f"C library unchecked by {name} here: {error}")
    done = run(check, tmp_path / "build")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(": all checks passed\n"), done.stdout
