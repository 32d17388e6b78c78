"""A text scored by our engine and by live bitnet.cpp: the logits of every token have equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest

import crossval
from crossval import registry
from crossval.receipts.policy import Policy

pytestmark = pytest.mark.live
TEXT = "the old river <|eot_id|> ran\né 42 + 17 = "


@pytest.mark.parametrize("generation", ["march", "main"])
def test_every_token(generation: str, shipped_model: Path, request) -> None:
    library = request.getfixturevalue(f"{generation}_library")
    receipt = crossval.score_text(
        TEXT,
        shipped_model,
        reference=f"bitnet.cpp:{library}",
        n_context=9,
        n_threads=2,
        follow_reference_graph=True,
    )
    results = receipt["results"]
    assert receipt.verdict == "pass"
    assert results["n_scored"] == results["n_equal_logits"] == results["n_equal_nll"] > 20
    assert results["digests"]["candidate"] == results["digests"]["reference"]
    followed = generation == "main"  # the shipped model's activation is not main's
    failed = [check.name for check in registry.judge(receipt, Policy(allow_dirty=True)) if not check.passed]
    assert failed == (["graph"] if followed else [])
