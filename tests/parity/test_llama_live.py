"""Llama, and BitNet with a ``.scale`` per matrix, against live bitnet.cpp of both generations: equal bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_py.synth import PRESETS, write_model
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.errors import EngineCrashError
from crossval.model import taps
from tests.same_bits import compare
from tests.support.judged import judge

pytestmark = pytest.mark.live
MakeModel = Callable[..., Path]

GQA = {"arch": "llama", "n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 768}
SHAPES = {
    "separate head, heads of 256": {
        **GQA, "dim": 512, "n_heads": 2, "n_kv_heads": 1, "untied_head": True, "rope_base": 1000042.0,
    },
    "tied head, biases, frequency factors": {**GQA, "biases": True, "rope_freqs": True},
    "wide heads, linear scaling": {**GQA, "head_dim": 96, "hidden_dim": 640, "rope_scaling": 4.0},
    "bitnet with scales": {**GQA, "arch": "bitnet", "scales": True, "dim": 384, "n_kv_heads": 4},
}  # fmt: skip
OF_MAIN = {**SHAPES, "llama with scales": {**GQA, "scales": True, "biases": True}}
LENGTHS = (1, 5, 66)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_march(make_model: MakeModel, march_library: Path, shape: dict) -> None:
    score = compare(make_model(**shape), march_library, None, LENGTHS, 2)
    assert score.n_prompts == len(LENGTHS)
    assert not score.different, score


@pytest.mark.parametrize("flash_attention", [False, True], ids=["", "flash"])
@pytest.mark.parametrize("shape", OF_MAIN.values(), ids=OF_MAIN)
def test_main(make_model: MakeModel, main_library: Path, shape: dict, flash_attention: bool) -> None:
    score = compare(make_model(**shape), main_library, None, LENGTHS, 2, flash_attention=flash_attention)
    assert score.n_prompts == len(LENGTHS)
    assert not score.different, score


@pytest.mark.parametrize("generation", ["march", "main"])
def test_every_tap_is_captured_and_right(
    make_model: MakeModel, request: pytest.FixtureRequest, generation: str
) -> None:
    """Nodes called alike in BitNet's graph hold other tensors here: the audit would find one taken for another."""
    path = make_model(**SHAPES["tied head, biases, frequency factors"])
    with BitnetCppRunner(path, library=request.getfixturevalue(f"{generation}_library")) as runner:
        found = runner.eval([5, 90, 17, 63], taps.of_model(3)).taps
        known = set(taps.of_graph("llama")) - runner.identity.numerics.inside_others("llama")
        assert set(found) == {name for name in taps.of_model(3) if taps.parse(name).tap in known}
        runner.reset()
        with BitnetPyRunner(path, n_threads=1, numerics=runner.identity.numerics) as engine:
            assert judge(engine, runner, [5, 90, 17, 63], path, n_decode=2).verdict == "parity"


def test_march_does_not_load_scales_of_llama(make_model: MakeModel, march_library: Path) -> None:
    with pytest.raises(EngineCrashError, match="could not load"):
        BitnetCppRunner(make_model(**OF_MAIN["llama with scales"]), library=march_library).__enter__()


def test_falcon3_1b_shape(tmp_path: Path, march_library: Path, main_library: Path) -> None:
    """1.4 GB and minutes: only on request."""
    if os.environ.get("BITNET_TEST_2B") != "1":
        pytest.skip("the Falcon3-1B shape takes 1.4 GB of disk and minutes: set BITNET_TEST_2B=1 to test it")
    model = tmp_path / "falcon3-1b.gguf"
    write_model(model, PRESETS["falcon3-1b"])
    for library, more in ((march_library, {}), (main_library, {}), (main_library, {"flash_attention": True})):
        score = compare(model, library, None, (1, 13), 1, **more)
        assert not score.different, score
