"""The C library under AddressSanitizer and UndefinedBehaviorSanitizer.

`make sanitize tsan valgrind` check more: each also proves that it sees what is broken.
"""

from __future__ import annotations

import pytest

from tests.support.checked_library import CHECKS, ROOT, MissingTool, edited, require_tools, run


@pytest.mark.parametrize("name", CHECKS)
def test_every_edit_has_its_place_in_the_sources(name):
    check = CHECKS[name]
    assert check.mistakes
    for edit in (*check.instruments, *check.mistakes):
        text = (ROOT / "bitnet_py" / "csrc" / edit.file).read_text()
        assert edited(text, edit) != text


@pytest.mark.long
@pytest.mark.extra
def test_c_library_passes_the_sanitizers(tmp_path):
    check = CHECKS["sanitize"]
    try:
        require_tools(check, tmp_path)
    except MissingTool as error:
        pytest.skip(f"C library not sanitized here: {error}")
    done = run(check, tmp_path / "checked")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(": all checks passed\n"), done.stdout
