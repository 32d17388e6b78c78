"""The written documentation: links and anchors resolve, paths exist, every page is indexed, prose is wrapped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.module_list import module_list

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [path for folder in ("models", "tools") for path in sorted((ROOT / folder).rglob("README.md"))]
GENERATED = {"commands.md", "variants.md", "zoo.md", "zoo-architectures.md", "recordings.md", "modules.md"}
WRAPPED = [page for page in PAGES if page.name not in GENERATED]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:bitnet_py|crossval|docs|examples|models|schemas|tests|tools)/[\w/.-]+\.\w+)`")


def prose(path: Path) -> str:
    """Return a page without its fenced and indented blocks and tables."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^(?: {4}|\|).*$", "", text, flags=re.M)


def anchors(path: Path) -> set[str]:
    """Return the fragments of a page's headings, as forges form them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=names)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    assert [path for path in PATH.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", WRAPPED, ids=names)
def test_prose_is_wrapped_at_100_columns(page: Path) -> None:
    assert [line for line in prose(page).splitlines() if len(line) > 100] == []


def test_every_page_is_in_the_index() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS} - {"README.md"} <= listed


def test_the_list_of_modules_is_what_the_files_say() -> None:
    page = ROOT / "docs" / "modules.md"
    assert page.read_text(encoding="utf-8") == module_list(), "python -m tools.module_list > docs/modules.md"
