"""How a module of this package is started as a child process; imports the standard library only."""

from __future__ import annotations

import sys
from pathlib import Path


def child_command(module: str) -> list[str]:
    """Return the command of a child that calls ``main(argv)`` of a module of this package.

    Nothing is imported from the working directory.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.pop(0); {root!r} in sys.path or sys.path.insert(0, {root!r}); "
        f"from {module} import main; main(sys.argv[1:])"
    )
    return [sys.executable, "-c", code]
