"""Everything that the packages read when they run is inside them, in a checkout and in a wheel."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from bitnet_py.resources import default_model_path
from crossval.engines import tap_maps
from crossval.engines.goldens import list_goldens
from crossval.schema import schema_dir
from crossval.smoke import suite
from crossval.texts import evidence

ROOT = Path(__file__).parents[3]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGES = dict(
    re.findall(
        r'^"?([\w/]+)"? = "(\w+)"$', PYPROJECT.split("[tool.scikit-build.wheel.packages]")[1].split("\n[")[0], re.M
    )
)
"""Place in the wheel -> folder of the checkout."""


def test_the_wheel_holds_both_packages_the_schemas_and_the_models() -> None:
    assert PACKAGES == {
        "bitnet_py": "bitnet_py",
        "crossval": "crossval",
        "crossval/_data/schemas": "schemas",
        "crossval/_data/models": "models",
    }
    (excluded,) = re.findall(r"^wheel.exclude = \[(.*)\]$", PYPROJECT, re.M)
    assert excluded == '"bitnet_py/csrc/**"', "nothing that is read when the package runs"


@pytest.mark.parametrize("place", [
    default_model_path, schema_dir, lambda: suite.DATA_DIR, lambda: evidence.FILE, lambda: tap_maps.MAPS,
    lambda: Path(str(resources.files("crossval") / "data" / "report" / "page.html.jinja")),
])  # fmt: skip
def test_what_the_packages_read_lies_where_the_wheel_takes_it_from(place) -> None:
    path = place().resolve()
    assert path.exists()
    folder = path.relative_to(ROOT).parts[0]
    assert folder in PACKAGES.values()


def test_data_are_tracked_by_git_or_no_distribution_has_them() -> None:
    """Both distributions leave out what git ignores."""
    tracked = set(subprocess.run(
        ["git", "ls-files", *PACKAGES.values()], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines())  # fmt: skip
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if not line.endswith("/")]
    needed = [default_model_path(), *schema_dir().glob("*.json"), *suite.DATA_DIR.iterdir(), evidence.FILE]
    needed += [*tap_maps.MAPS.glob("*.json"), *Path(str(resources.files("crossval") / "data/report")).iterdir()]
    needed += [path for golden in list_goldens(default_model_path()) for path in golden.path.iterdir()]
    for path in needed:
        name = path.resolve().relative_to(ROOT).as_posix()
        assert name in tracked, name
        assert not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored), name
