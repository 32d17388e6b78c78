"""Write ``docs/modules.md``: every module in one line (``python -m tools.module_list > docs/modules.md``).

The line is the first sentence of the module's docstring, or of the comment at the head of a C file.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Modules

Which file holds what? Generated from the first line of every file; do not edit. Renew with
`python -m tools.module_list > docs/modules.md`. How the parts work together:
[architecture.md](architecture.md).
"""


def module_list() -> str:
    """Return the page."""
    folders = sorted({path.parent for package in ("bitnet_py", "crossval") for path in _sources(ROOT / package)})
    return "\n".join([HEADER, *(_section(folder) for folder in folders)])


def _sources(folder: Path) -> list[Path]:
    return sorted(path for suffix in ("*.py", "*.c", "*.h") for path in folder.rglob(suffix))


def _section(folder: Path) -> str:
    lines = [f"## {folder.relative_to(ROOT)}", "", "| file | what it holds |", "|---|---|"]
    rows = [(path.name, summary(path)) for path in sorted(folder.iterdir()) if path in _sources(folder)]
    lines += [f"| `{name}` | {text} |" for name, text in rows if text]
    return "\n".join([*lines, ""])


def summary(path: Path) -> str:
    """Return the first line of a file's documentation; empty when it has none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif not text.startswith("/*"):
        return ""
    else:
        text = "\n".join(line.strip(" *") for line in text.split("*/")[0][2:].splitlines())
    return " ".join(text.strip().split("\n\n")[0].split()).replace("|", r"\|")


if __name__ == "__main__":
    print(module_list(), end="")
