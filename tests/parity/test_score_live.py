"""A text scored by our engine and by live bitnet.cpp: the logits of every token have equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval import api

pytestmark = pytest.mark.live
TEXT = "the old river <|eot_id|> ran\né 42 + 17 = "


@pytest.mark.parametrize("generation", ["march", "main"])
def test_every_token(generation: str, shipped_model: Path, request) -> None:
    library = request.getfixturevalue(f"{generation}_library")
    found = api.score_text(
        TEXT,
        shipped_model,
        reference=f"bitnet.cpp:{library}",
        n_context=9,
        n_threads=2,
        follow_reference_graph=True,
    )
    assert found.equal
    assert found.same_arithmetic
    assert found.n_scored == found.n_equal_logits == found.n_equal_nll > 20
    assert found.n_windows == -(-found.n_scored // 8)
