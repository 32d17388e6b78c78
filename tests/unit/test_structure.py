"""The structure of ``crossval``: imports run downwards, and a newcomer finds few files at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import crossval

ROOT = Path(crossval.__file__).parent
MAX_FLOORS = 10
MAX_TOP_FILES = 11
DEFERRED = {
    "crossval": "the public API is loaded when one of its names is asked for",
    "crossval.schema": "the library that says what is wrong takes longer to load than a valid receipt to check",
}
"""Modules that may import inside functions, and why."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of this package that a piece of code imports, or names as ``module:name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, is_place, _ = node.value.partition(":")
            if is_place and module in MODULES:
                yield module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole
                elif node.module in MODULES:
                    yield node.module


def room(module: str) -> str:
    """Return the folder or the file right below ``crossval`` that a module belongs to."""
    return ".".join(module.split(".")[:2])


@cache
def trees() -> dict[str, ast.Module]:
    """Return every module, parsed: not before a test asks, since every worker collects all tests."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@cache
def imports() -> dict[str, set[str]]:
    return {name: set(imported(tree)) - {name} for name, tree in trees().items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return how many imports lead from each node down to one that imports nothing, plus one."""
    found: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():  # raises CycleError
        found[node] = 1 + max((found[other] for other in graph.get(node, ())), default=0)
    return found


def test_modules_do_not_import_in_circles() -> None:
    assert floors(imports())


def test_folders_do_not_import_in_circles_and_stand_on_few_floors() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in imports().items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others)
    graph = {name: others - {name, "crossval"} for name, others in rooms.items()}
    found = floors(graph)
    assert max(found.values()) <= MAX_FLOORS, sorted(found.items(), key=lambda item: item[1])


def test_few_files_at_the_top() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MAX_TOP_FILES


def test_imports_are_at_the_top_of_modules() -> None:
    """An import within a function or only for type checkers may hide an upward dependency."""
    hidden = [
        name
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.If)
        if any(imported(statement) for statement in node.body for _ in imported(statement))
    ]
    assert set(hidden) <= set(DEFERRED), sorted(set(hidden) - set(DEFERRED))


@pytest.mark.parametrize(
    ("program", "others"),
    [
        ("import crossval.engines", {"diagnose", "bench", "report", "api", "cli", "registry"}),
        (
            "from crossval.cli import cli; cli.commands['gate']",
            {"report", "smoke", "bench", "weights", "diagnose"},
        ),
        ("from crossval.cli import cli; cli.commands['layers']", {"report", "smoke", "bench", "weights", "sweep"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(program: str, others: set[str]) -> None:
    code = f"import sys; {program}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in found.stdout.split() if name.startswith("crossval.")}
    assert loaded & others == set()
