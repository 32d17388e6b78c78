"""The NumPy engine: correct in every style, wrong where a bug is injected, and independent of the project."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.support import numpy_bitnet
from tests.support.numpy_bitnet.mistakes import MISTAKES, first_place, in_layers
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import record
from tests.support.numpy_bitnet.styles import PLAIN, STYLES, lanes, wide
from tests.zoo.recording import first_difference

PROMPT = (5, 17, 255, 42, 9, 133, 60)
FORMULAS = (
    "crossval.model.kinds",
    "crossval.diagnose.variants",
    "crossval.audit",
    "crossval.engines.spec",
    "bitnet_py",
)

QUIET = {PLAIN.name, "quantiser in float64", "quantiser fused", "prompt in pieces"}
"""Styles whose bits differ from the plain one's only near a tie, or with a longer prompt."""


@pytest.fixture(scope="module")
def model(make_model) -> Model:
    return Model(make_model())


def test_it_shares_no_formula_with_the_harness():
    for path in Path(numpy_bitnet.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(FORMULAS)], path.name


def test_styles_have_names_of_their_own():
    assert len({style.name for style in STYLES}) == len(STYLES) >= 12


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_style_computes_the_same_up_to_its_rounding(model, style):
    ours, plain = (record(model, PROMPT, 1, one, forced=(3,)) for one in (style, PLAIN))
    logits = [np.concatenate([p.taps["result_output"].array for p in one.passes[-2:]]) for one in (ours, plain)]
    distance = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1])
    assert distance < 0.1  # a flipped int8 code, or F16 keys and values, and what follows from them
    assert style.name in QUIET or any(
        a.taps[name].array.tobytes() != b.taps[name].array.tobytes()
        for a, b in zip(ours.passes, plain.passes, strict=False)
        for name in b.taps
    )


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=lambda mistake: mistake.name)
def test_a_mistake_shows_first_where_it_is(model, mistake, layer):
    made = mistake if layer is None else in_layers(mistake, [layer])
    forced = (3,)
    shown = first_difference(
        record(model, PROMPT, 1, forced=forced), record(model, PROMPT, 1, mistakes=[made], forced=forced)
    )
    assert shown is not None
    assert shown.tap == first_place(made)


@pytest.mark.parametrize("width", [4, 8, 16, 32])
def test_lanes_sum_what_a_wide_sum_does(width):
    rng = np.random.default_rng(width)
    a, b = (rng.standard_normal((rows, 77)).astype(np.float32) for rows in (5, 9))
    assert np.allclose(lanes(width)(a, b), wide(a, b), rtol=1e-5, atol=1e-5)
    assert np.array_equal(lanes(width)(np.rint(9 * a), np.rint(9 * b)), wide(np.rint(9 * a), np.rint(9 * b)))
