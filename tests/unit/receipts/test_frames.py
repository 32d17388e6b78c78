"""The tables of every committed receipt, as DataFrames."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.receipts import file
from crossval.receipts.frames import MAIN, frames

RECEIPTS = sorted((Path(__file__).parents[3] / "receipts").glob("*.json"))


@pytest.mark.parametrize("path", RECEIPTS, ids=lambda path: path.stem)
def test_the_first_table_holds_what_the_kind_is_about(path: Path) -> None:
    receipt = file.read(path)
    found = frames(receipt)
    first = MAIN.get(receipt["kind"], "rows")
    assert next(iter(found)) == first
    results = receipt["results"]
    held = {
        "rows": lambda: len(results["rows"]),
        "steps": lambda: sum(len(prompt["steps"]) for prompt in results["prompts"]),
        "measures": lambda: len(results["measures"]),
    }[first]()
    assert len(found[first]) == len(receipt.frame()) == held > 0


def test_numbers_keep_their_values_and_sides_become_a_column() -> None:
    receipt = file.read(next(path for path in RECEIPTS if path.stem == "layers-shipped"))
    found = frames(receipt)
    assert found["rows"]["cosine"].tolist() == [row["cosine"] for row in receipt["results"]["rows"]]
    audits = receipt["audit"]
    assert found["audit"].groupby("side").size().to_dict() == {
        side: len(audits[side]["rows"]) for side in ("candidate", "reference")
    }


def test_rounds_of_a_benchmark_are_one_row_per_measurement() -> None:
    receipt = file.read(next(path for path in RECEIPTS if path.stem == "bench-shipped"))
    rounds = frames(receipt)["rounds"]
    decode = receipt["results"]["measures"]["decode"]
    mine = rounds[(rounds["measure"] == "decode") & (rounds["side"] == "candidate")]
    assert mine["value"].tolist() == decode["candidate"]["raw"]


def test_a_receipt_in_which_nothing_was_compared_has_no_main_table() -> None:
    receipt = file.read(next(path for path in RECEIPTS if path.stem == "layers-shipped"))
    receipt["results"]["rows"] = []
    assert "kernels" in receipt.frames()
    with pytest.raises(KeyError, match=r"no table 'rows'; this layers receipt has audit, kernels"):
        receipt.frame()
