"""The examples in docs/python.md run and give what the page shows; importing ``crossval`` loads little."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import crossval

PAGE = Path(__file__).parents[3] / "docs" / "python.md"
GOLDEN = PAGE.parents[1] / "models" / "bitnet-qa.goldens" / "what-is-2-2"


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    names = {"golden": str(GOLDEN), "folder": tmp_path}
    flags = doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, globs=names, optionflags=flags)
    assert tried >= 10
    assert failed == 0


@pytest.mark.parametrize("name", crossval.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(crossval, name).__doc__


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        assert crossval.nothing


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, crossval; print([name for name in sys.modules if name.startswith('crossval.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
