"""Receipts over time."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import pytest

import crossval
from crossval.console import console
from crossval.errors import BadInputError
from crossval.receipts.file import Receipt
from crossval.report import history

ROOT = Path(__file__).parents[3]
PARITY = ROOT / "receipts/layers-shipped.json"


def at(when: str, **changed: object) -> Receipt:
    receipt = Receipt(copy.deepcopy(dict(crossval.open_receipt(PARITY))))
    receipt["created_at"] = when
    receipt.update(changed)
    return receipt


def test_changes_are_of_the_same_comparison_in_the_order_of_time() -> None:
    parity = dict(at("2026-01-01T00:00:00Z")["parity"], exact_match_rate=0.5)
    other = at("2026-01-02T12:00:00Z")
    other["prompt"]["text"] = "another"
    made = history.table(
        [
            ("third", at("2026-01-03T00:00:00Z", verdict="candidate_defect", parity=parity)),
            ("first", at("2026-01-01T00:00:00Z")),
            ("other", other),
            ("second", at("2026-01-02T00:00:00Z")),
        ]
    )
    assert list(made["receipt"]) == ["first", "second", "other", "third"]
    assert list(made["change"]) == ["", "", "", "parity → candidate_defect, equal 100 % → 50.00 %"]
    stream = io.StringIO()
    history.show(console(stream), made)
    assert "4 receipts, 2 comparisons, 1 changes" in stream.getvalue()


def test_a_folder_is_every_receipt_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "receipts"
    (folder / "main").mkdir(parents=True)
    for name in ("bench-shipped.json", "greedy-odd-shape.json"):
        shutil.copy(ROOT / "receipts" / name, folder / ("main" if name.startswith("bench") else "") / name)
    made = crossval.read_history([folder])
    assert set(made["receipt"]) == {"main/bench-shipped.json", "greedy-odd-shape.json"}
    assert made["created_at"].is_monotonic_increasing
    bench = made[made["kind"] == "bench"]
    assert bench["decode_ratio"].notna().any()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="no receipt in"):
        crossval.read_history([tmp_path / "empty"])
    (folder / "other.json").write_text("{}")
    with pytest.raises(BadInputError):
        crossval.read_history([folder])
