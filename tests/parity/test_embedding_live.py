"""Embedding models in live bitnet.cpp: main gives every bit, flash attention off and on; March has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import crossval
from bitnet_py.synth import write_model
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.errors import BadInputError
from crossval.model import taps
from tests.support.embedding_models import MODELS, written

pytestmark = pytest.mark.live
FORMS = {
    name + ending: replace(config, **changes)
    for name, config in MODELS.items()
    for ending, changes in (("", {}), ("-plain", {"sub_norms": False, "pooling": "cls", "norms": "f32"}))
}
TEXT = "query: the house of a small animal"


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    write_model(tmp_path / "model.gguf", FORMS[request.param])
    return request.param, tmp_path / "model.gguf"


def test_every_tap_is_captured_but_what_main_does_not_name(model: tuple[str, Path], main_library: Path) -> None:
    form, path = model
    name, normed = form.removesuffix("-plain"), not form.endswith("-plain")
    for flash_attention in (False, True):
        with BitnetCppRunner(path, library=main_library, flash_attention=flash_attention) as runner:
            found = runner.eval([5, 90, 17], taps.all_taps(2)).taps
            inside = runner.identity.numerics.inside_others(name, normed)
        known = set(taps.of_graph(name, normed, True)) - inside
        assert {taps.parse(tap).tap for tap in found} == known


def test_layers_bit_for_bit(model: tuple[str, Path], main_library: Path) -> None:
    """With flash attention too: the default run is part of the receipt."""
    receipt = crossval.compare_engines(TEXT, model[1], reference=f"bitnet.cpp:{main_library}", full=True)
    assert receipt["verdict"] == "parity"
    assert receipt["first_inexact"] is None
    assert receipt["default_run"]["first_inexact"] is None
    assert {row["tap"] for row in receipt["results"]["rows"]} >= {"pooled", "embedding"}


@pytest.mark.parametrize("name", MODELS)
def test_march_refuses_them_by_name(name: str, tmp_path: Path, march_library: Path) -> None:
    with pytest.raises(BadInputError, match=f"architecture '{name}'; of bitnet.cpp of March 2026 the graphs of"):
        crossval.compare_engines(TEXT, written(name, tmp_path), reference=f"bitnet.cpp:{march_library}")
