"""Fixtures shared by all tests: the shipped model and tiny synthetic ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Test workers share the cores: BLAS threads on top of them wait for each other. Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests start Python hundreds of times: modules are compiled once, even where nothing may be written beside them.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / "build" / "pycache")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from collections.abc import Callable, Iterator

import pytest

from bitnet_py.model import Model
from bitnet_py.resources import default_model_path
from bitnet_py.synth import PRESETS, SynthConfig, write_model
from crossval.bitnet_cpp.remedies import (
    BUILD_DIR_VARIABLE,
    GENERATION_VARIABLE,
    LIBRARY_VARIABLE,
    SOURCE_VARIABLE,
)
from crossval.diagnose import segment as segment_diagnosis
from tests.support import extra

TERMINAL_VARIABLES = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
MakeModel = Callable[..., Path]

TINY = {"n_layers": 2, "dim": 128, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 256, "vocab_size": 300}


def pytest_configure(config: pytest.Config) -> None:
    """Say which cases are taken before test modules are read."""
    extra.configure(config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def nothing_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a folder in which no bitnet.cpp was built."""
    return tmp_path_factory.mktemp("nothing-built")


@pytest.fixture(autouse=True)
def no_live_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, nothing_built: Path) -> None:
    """Hide the user's settings, and from tests without the marker ``live`` a bitnet.cpp, built or configured."""
    for variable in (*(name for name in os.environ if name.startswith("CROSSVAL_")), *TERMINAL_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("crossval.cli.output.EVERY_S", float("inf"))  # how far work is depends on the machine
    if request.node.get_closest_marker("live") is not None:
        return
    for variable in (LIBRARY_VARIABLE, SOURCE_VARIABLE, GENERATION_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(BUILD_DIR_VARIABLE, str(nothing_built))


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """Path of the model that ships with the project."""
    return default_model_path()


@pytest.fixture(scope="session")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the synthetic preset ``small``: five layers, random weights."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_model(path, PRESETS["small"])
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return ``make(**SynthConfig fields) -> Path``: a tiny model by default, each written once.

    The file is shared by the whole session: copy it before changing it.
    """
    folder = tmp_path_factory.mktemp("models")
    made: dict[SynthConfig, Path] = {}

    def make(**shape: object) -> Path:
        config = SynthConfig(**{**TINY, **shape})  # type: ignore[arg-type]  # a wrong field fails here
        if config not in made:
            path = folder / f"model-{len(made)}.gguf"
            write_model(path, config)
            made[config] = path
        return made[config]

    return make


@pytest.fixture
def tiny_model(make_model: MakeModel) -> Iterator[Model]:
    """Return an open tiny model; one thread."""
    with Model.from_gguf(make_model(), n_threads=1) as model:
        yield model


@pytest.fixture
def unnamed_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find wrong segments without the search for the bug inside, as with a very large model.

    For tests of the place and the verdict: a search takes seconds, and test_segment_diagnosis has it.
    """
    monkeypatch.setattr(segment_diagnosis, "MOST_WORK", 0)
