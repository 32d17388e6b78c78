"""Embedding and LM head of every type against live bitnet.cpp, both generations: all bits of every tap.

``python -m tests.same_bits`` has more models and prompts.
"""

from __future__ import annotations

import pytest

from bitnet_py.tables import TABLES
from tests.same_bits import compare

pytestmark = pytest.mark.live

SHAPE = {"n_layers": 1, "dim": 256, "hidden_dim": 256, "vocab_size": 300}


@pytest.mark.parametrize("embedding", [name for name in TABLES if name != "f16"])
def test_march(make_model, march_library, embedding):
    score = compare(make_model(**SHAPE, embedding=embedding), march_library, None, (1, 13), 1)
    assert score.n_taps > 0
    assert not score.different, score


@pytest.mark.parametrize("embedding", [name for name in TABLES if name != "f16"])
def test_main(make_model, main_library, embedding):
    score = compare(make_model(**SHAPE, embedding=embedding), main_library, None, (1, 13), 1)
    assert score.n_taps > 0
    assert not score.different, score


@pytest.mark.parametrize(
    "shape", [{"embedding": "q4_0"}, {"head": "q4_0"}, {"head": "q6_k"}, {"head": "f32"}], ids=str
)
def test_llama_in_main(make_model, main_library, shape):
    """Its graph has a head of its own, which main packs anew if it is of Q4_0 and has a multiple of 8 rows."""
    path = make_model(**{**SHAPE, "vocab_size": 304, "arch": "llama", "sub_norms": False, **shape})
    score = compare(path, main_library, None, (1, 13), 1)
    assert score.n_taps > 0
    assert not score.different, score


def test_norms_of_f16_in_main(make_model, main_library):
    """March aborts at them."""
    score = compare(make_model(**SHAPE, norms="f16"), main_library, None, (1, 13), 1)
    assert score.n_taps > 0
    assert not score.different, score
