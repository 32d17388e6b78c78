"""The C library under AddressSanitizer and UndefinedBehaviorSanitizer.

`make tsan valgrind` check more and take longer; each make target also proves that it sees what is broken.
"""

from __future__ import annotations

import pytest

from tests.support.checked_library import CHECKS, MissingTool, require_tools, run


@pytest.mark.long
def test_c_library_passes_the_sanitizers(tmp_path):
    check = CHECKS["sanitize"]
    try:
        require_tools(check, tmp_path)
    except MissingTool as error:
        pytest.skip(f"C library not sanitized here: {error}")
    done = run(check, tmp_path / "checked")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(": all checks passed\n"), done.stdout
