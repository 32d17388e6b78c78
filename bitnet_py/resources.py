"""Find the files that ship with the package, in a source checkout as well as in an installed wheel."""

from __future__ import annotations

import importlib
from pathlib import Path

from bitnet_py.errors import ModelError

DEFAULT_MODEL_NAME = "bitnet-synthetic.gguf"


def _candidates(name: str) -> list[Path]:
    """Return where a shipped model may lie, a source checkout's ``models/`` first."""
    places = [Path(__file__).resolve().parent.parent / "models" / name]
    try:
        package = importlib.import_module("crossval")
    except ImportError:
        return places
    # An installed wheel keeps the models there (pyproject.toml); __path__ also covers editable installs.
    return places + [Path(root) / "_data" / "models" / name for root in package.__path__]


def default_model_path() -> Path:
    """Return the path of the model that ships with the project.

    Raises:
        ModelError: it is neither in the checkout nor in the installed package.
    """
    places = _candidates(DEFAULT_MODEL_NAME)
    for place in places:
        if place.is_file():
            return place
    looked = " or ".join(str(place) for place in places)
    raise ModelError(
        f"{DEFAULT_MODEL_NAME}: expected the shipped model at {looked}, found nothing; reinstall the package, "
        "or give a model with --model"
    )
