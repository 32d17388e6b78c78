"""Fixtures shared by all tests: the shipped model and tiny synthetic ones."""

from __future__ import annotations

import os

# Test workers share the cores: BLAS threads on top of them wait for each other. Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_py.model import Model
from bitnet_py.resources import default_model_path
from bitnet_py.synth import PRESETS, SynthConfig, write_model
from crossval.diagnose import segment as segment_diagnosis

MakeModel = Callable[..., Path]

TINY = {"n_layers": 2, "dim": 128, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 256, "vocab_size": 300}


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
