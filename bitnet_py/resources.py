"""Find the files that ship with the package, in a source checkout as well as in an installed wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bitnet_py.errors import ModelError

DEFAULT_MODEL_NAME = "bitnet-qa.gguf"


def _candidates(name: str) -> list[Path]:
    """Return the places of a shipped model, a source checkout's ``models/`` first."""
    places = [Path(__file__).resolve().parent.parent / "models" / name]
    # An installed wheel keeps the models in the other package (pyproject.toml), which is located but
    # never imported.
    spec = importlib.util.find_spec("crossval")
    roots = (spec.submodule_search_locations if spec else None) or []
    return places + [Path(root) / "_data" / "models" / name for root in roots]


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
