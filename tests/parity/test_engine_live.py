"""Our engine against live bitnet.cpp: bit-identical at every tap, prompt passes and single tokens, odd shapes."""

from __future__ import annotations

import os

import pytest

from bitnet_py.synth import PRESETS, write_model
from tests.same_bits import compare
from tests.support.families import each_family

pytestmark = pytest.mark.live

SHAPES = {
    "one head": {"n_layers": 2, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 256},
    "head_dim 20": {"n_layers": 2, "dim": 640, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 384},
    "head_dim 32, bitnet-25": {"dim": 256, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 384, "arch": "bitnet-25"},
    "rope base 10000": {"dim": 256, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 512, "rope_base": 10000.0},
}


def assert_equal_bits(model, library, kernel=None, lengths=(1, 2, 5, 13, 45), n_decode=3):
    score = compare(model, library, kernel, lengths, n_decode)
    assert score.n_prompts == len(lengths)
    assert not score.different, score


@each_family
def test_shipped_model(shipped_model, bitnet_cpp_library, kernel):
    assert_equal_bits(shipped_model, bitnet_cpp_library, kernel)


@each_family
def test_odd_shape(tmp_path, bitnet_cpp_library, kernel):
    model = tmp_path / "odd.gguf"
    write_model(model, PRESETS["odd"])
    assert_equal_bits(model, bitnet_cpp_library, kernel)


@each_family
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_shapes(make_model, shape, bitnet_cpp_library, kernel):
    assert_equal_bits(make_model(**shape), bitnet_cpp_library, kernel, (1, 2, 33), 2)


OF_MAIN = {
    **{name: shape for name, shape in SHAPES.items() if "arch" not in shape},
    "head_dim 10, vocabulary of 778": {
        "n_layers": 2, "dim": 640, "n_heads": 64, "n_kv_heads": 16, "hidden_dim": 640, "vocab_size": 778,
    },
    "head_dim 256": {"n_layers": 2, "dim": 1024, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 2816},
}  # fmt: skip
flash_or_not = pytest.mark.parametrize("flash_attention", [False, True], ids=["", "flash"])


@flash_or_not
class TestMain:
    @each_family
    def test_shipped_model(self, shipped_model, main_library, kernel, flash_attention):
        lengths = (1, 2, 5, 13, 45, 64, 100)
        score = compare(shipped_model, main_library, kernel, lengths, 2, flash_attention=flash_attention)
        assert not score.different, score

    @pytest.mark.parametrize("shape", OF_MAIN.values(), ids=OF_MAIN)
    def test_shapes(self, make_model, shape, main_library, flash_attention):
        lengths = (1, 2, 5, 13, 66)
        score = compare(make_model(**shape), main_library, None, lengths, 2, flash_attention=flash_attention)
        assert not score.different, score

    @pytest.mark.parametrize("n_threads", [1, 3])
    def test_many_cells_with_other_threads(self, make_model, main_library, n_threads, flash_attention):
        score = compare(
            make_model(), main_library, None, (255, 300), 3, flash_attention=flash_attention, n_threads=n_threads
        )
        assert not score.different, score


def test_2b_4t_shape(tmp_path, bitnet_cpp_library):
    """1.2 GB and minutes: only on request."""
    if os.environ.get("BITNET_TEST_2B") != "1":
        pytest.skip("the 2B-4T shape takes 1.2 GB of disk and a minute or two: set BITNET_TEST_2B=1 to test it")
    model = tmp_path / "2b.gguf"
    write_model(model, PRESETS["2b-4t"])
    assert_equal_bits(model, bitnet_cpp_library, None, (1, 5, 13), 1)


@pytest.mark.timeout(1800)
def test_large_shape(tmp_path, march_library, main_library):
    """270 MB and minutes: only on request."""
    if os.environ.get("BITNET_TEST_2B") != "1":
        pytest.skip("the shape of bitnet_b1_58-large takes minutes: set BITNET_TEST_2B=1 to test it")
    model = tmp_path / "large.gguf"
    write_model(model, PRESETS["large"])
    for library, more in ((march_library, {}), (main_library, {}), (main_library, {"flash_attention": True})):
        score = compare(model, library, None, (1, 5, 13), 2, **more)
        assert not score.different, score
