from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossval.errors import BadInputError
from crossval.receipts import columns
from crossval.receipts import file as receipt
from tests.support import receipt_samples as samples
from tests.support.extra import examples

RECEIPTS = Path(__file__).parents[3] / "receipts"

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, -0.0, 1.0, 1 / 3])
    | st.text("ab", max_size=2)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=12,
)
ROWS = st.lists(
    st.fixed_dictionaries({"a": JSON, "b": st.none() | st.fixed_dictionaries({"c": JSON})}), max_size=5
)


def strictly(value: Any) -> str:
    """JSON text, in which 1, 1.0 and true differ, and so do 0.0 and -0.0."""
    return json.dumps(value, sort_keys=True)


def through_file(value: dict[str, Any]) -> Any:
    return columns.unpack(json.loads(columns.to_text(value)), 1 << 20, "x")


@settings(max_examples=examples(300), deadline=None)
@given(value=st.fixed_dictionaries({"notes": JSON, "rows": ROWS}))
def test_what_is_written_is_read_back(value):
    assert strictly(through_file(value)) == strictly(value)


def test_equal_values_are_told_apart_by_type():
    rows = [{"a": 1, "b": 0.0}, {"a": True, "b": -0.0}, {"a": 1.0, "b": 0.0}]
    assert strictly(through_file({"rows": rows})) == strictly({"rows": rows})


def test_a_table_is_written_by_column():
    rows = [{"tap": f"blk.{i}.q", "n": 5, "worst": {"at": [i]} if i else None, "note": None} for i in range(40)]
    text = columns.to_text({"verdict": "parity", "audit": {"rows": rows}, "a": 1, "kind": "layers"})
    assert text.splitlines()[1:4] == [' "kind": "layers",', ' "verdict": "parity",', ' "a": 1,']
    table = json.loads(text)["audit"]["rows"]
    assert table["$rows"] == 40
    assert table["fields"]["n"] == {"same": 5}
    assert table["fields"]["note"] == {"same": None}
    assert table["fields"]["tap"] == [f"blk.{i}.q" for i in range(40)]
    assert table["fields"]["worst"] == {"null": [0], "fields": {"at": [[i] for i in range(1, 40)]}}
    assert text.count("\n") < 25


def test_few_values_are_written_once():
    rows = [{"kind": "prefill" if i % 3 else "decode", "n": [1, 1.0, True, None][i % 4]} for i in range(24)]
    written = json.loads(columns.to_text({"rows": rows}))["rows"]["fields"]
    assert written["kind"] == {"of": ["decode", "prefill"], "is": [min(i % 3, 1) for i in range(24)]}
    assert strictly(through_file({"rows": rows})) == strictly({"rows": rows})


def test_a_table_like_another_has_what_differs():
    def rows(ratio: float, worst: Any, **more: Any) -> list[dict[str, Any]]:
        taps = [{"tap": f"blk.{i}.q", "ratio": i / 7, "worst": {"at": i} if i % 2 else None} for i in range(20)]
        taps[3].update(ratio=ratio, worst=worst)
        return [{**tap, **more} for tap in taps]

    receipt = {
        "audit": {"candidate": {"rows": rows(1.0, None, n=1)}, "reference": {"rows": rows(1, {"at": [3]}, n=2)}},
        "default_run": [{"rows": rows(1.0, None, n=1)}],
        "results": {"rows": rows(1.0, None, other=1)},
    }
    written = json.loads(columns.to_text(receipt))
    assert strictly(through_file(receipt)) == strictly(receipt)
    assert written["audit"]["reference"]["rows"] == {
        "$rows": 20,
        "like": "/audit/candidate/rows",
        "fields": {"n": {"same": 2}, "ratio": {"but": [[3, 1]]}, "worst": {"but": [[3, {"at": [3]}]]}},
    }
    assert written["default_run"][0]["rows"] == {"$rows": 20, "like": "/audit/candidate/rows", "fields": {}}
    assert "like" not in written["results"]["rows"]
    assert through_file({"a": [receipt, receipt]})["a"] == [receipt, receipt]
    # Keys in another order, as other programs write them.
    assert strictly(columns.unpack(dict(reversed(written.items())), 1 << 20, "x")) == strictly(receipt)
    # Rows of one table are not those of another.
    read = through_file(receipt)
    read["default_run"][0]["rows"][1]["worst"]["at"] = "changed"
    assert read["audit"]["candidate"]["rows"][1]["worst"] == {"at": 1}


def test_the_receipt_does_not_depend_on_how_it_is_laid_out(tmp_path):
    made = samples.layers_receipt({(0, "blk.1.l_out"): 1e-6})
    by_column, by_row = tmp_path / "columns.json", tmp_path / "rows.json"
    receipt.write(by_column, made)
    by_row.write_text(receipt.to_text(made))
    assert "$rows" in by_column.read_text()
    assert receipt.read(by_column) == receipt.read(by_row) == made
    assert receipt.digest(receipt.read(by_column)) == made["digest"]
    assert by_column.stat().st_size < by_row.stat().st_size / 2


@pytest.mark.parametrize("path", receipt.in_folder(RECEIPTS), ids=lambda path: path.stem)
def test_committed_receipts_are_compact_and_lead_with_the_verdict(path):
    assert receipt.read_bytes(path).decode() == columns.to_text(receipt.read(path)), (
        "write it again with crossval.open_receipt(…).save"
    )
    assert path.stat().st_size <= 120_000, "compress it: a name that ends in .json.gz"


def table(n: Any = 2, **more: Any) -> dict[str, Any]:
    return {"$rows": n, "fields": {"a": [1, 2]}, **more}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (table(-1), "number of its rows"),
        (table(2.0), "number of its rows"),
        (table(True), "number of its rows"),
        (table("2"), "number of its rows"),
        (table(more=1), "number of its rows"),
        ({"$rows": 2}, "number of its rows"),
        ({"$rows": 2, "fields": []}, "at least one column"),
        ({"$rows": 2, "fields": {}}, "at least one column"),
        (table(3), "column 'a' .* each of 3 rows"),
        ({"$rows": 2, "fields": {"a": 1}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"same": 1, "null": []}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"same": [1]}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"same": {}}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"fields": {"b": [1]}, "null": [2]}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"fields": {"b": [1]}, "null": [True]}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"fields": {"b": []}, "null": [1, 1]}}}, "column 'a'"),
        ({"$rows": 2, "fields": {"a": {"fields": {"b": [1, 2]}, "null": [1]}}}, "column 'b' .* each of 1 rows"),
        ({"$rows": 2, "fields": {"a": {"of": [1], "is": [0]}}}, "column 'a'"),
        ({"$rows": 1, "fields": {"a": {"of": [1], "is": [1]}}}, "column 'a'"),
        ({"$rows": 1, "fields": {"a": {"of": [1], "is": [-1]}}}, "column 'a'"),
        ({"$rows": 1, "fields": {"a": {"of": [1, 2], "is": [True]}}}, "column 'a'"),
        ({"$rows": 1, "fields": {"a": {"of": [[1]], "is": [0]}}}, "column 'a'"),
        ({"$rows": 1, "fields": {"a": {"of": {}, "is": [0]}}}, "column 'a'"),
        ([table(), {"$rows": 2, "like": "/rows/1", "fields": {}}], "'/rows/1' is not the path of a table of 2"),
        ([table(), {"$rows": 3, "like": "/rows/0", "fields": {}}], "'/rows/0' is not the path of a table of 3"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": {"b": [1, 2]}}], "has some of its fields"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": []}], "has some of its fields"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": {"a": {"but": [[2, 1]]}}}], "from 0 to 1"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": {"a": {"but": [[True, 1]]}}}], "from 0 to 1"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": {"a": {"but": [[1]]}}}], "from 0 to 1"),
        ([table(), {"$rows": 2, "like": "/rows/0", "fields": {"a": {"but": {}}}}], "from 0 to 1"),
        ({"$rows": 2, "fields": {"a": {"but": [[0, 1]]}}}, "column 'a'"),
        ({"$rows": 2, "like": None, "fields": {}}, "'None' is not the path"),
        ({"$rows": 2, "like": "/rows/" + "9" * 5000, "fields": {}}, "is not the path"),
        ({"$rows": 1, "fields": {"a": [{"$rows": 1, "like": "/rows", "fields": {}}]}}, "within another"),
        ({"$rows": columns.MAX_ROWS + 1, "fields": {"a": {"same": 1}}}, "more than 1048576 rows"),
        ([table()] * 2 + [{"$rows": columns.MAX_ROWS - 3, "fields": {"a": {"same": 1}}}], "more than"),
        ({"$rows": 900_000, "fields": {str(i): {"same": 1} for i in range(10)}}, "or 8388608 cells"),
        ({"$rows": 10**4000, "fields": {"a": {"same": 1}}}, "more than"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_refused_in_one_line(value, message):
    with pytest.raises(BadInputError, match=f"^where: .*{message}") as error:
        columns.unpack({"rows": value}, 1 << 30, "where")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_small_file_cannot_state_a_large_table():
    """Rows that differ take two bytes each; few may be alike."""
    same = {"$rows": columns.FEW_ROWS, "fields": {"a": {"same": 1}}}
    assert columns.unpack(same, 50, "where") == [{"a": 1}] * columns.FEW_ROWS
    with pytest.raises(BadInputError, match="more than 4096 rows"):
        columns.unpack({**same, "$rows": columns.FEW_ROWS + 1}, 50, "where")
    different = [{"a": i % 2, "b": 1} for i in range(5 * columns.FEW_ROWS)]
    text = columns.to_text({"x": different})
    assert columns.unpack(json.loads(text), len(text), "where") == {"x": different}


def test_repetition_has_a_limit(monkeypatch):
    monkeypatch.setattr(columns, "MAX_REPEATED_BYTES", 1 << 20)
    half = "x" * (1 << 19)
    for column in ({"same": half}, {"of": [half], "is": [0, 0]}):
        with pytest.raises(BadInputError, match="more than 1 MB of repetition"):
            columns.unpack({"$rows": 2, "fields": {"a": column}}, 1 << 30, "where")
    full = {"$rows": 2, "fields": {"a": ["x" * (1 << 17), 1]}}
    assert (
        len(columns.unpack({"x": full, "y": [{"$rows": 2, "like": "/x", "fields": {}}] * 7}, 1 << 30, "")["y"])
        == 7
    )
    with pytest.raises(BadInputError, match="more than 1 MB of repetition"):
        columns.unpack({"x": full, "y": [{"$rows": 2, "like": "/x", "fields": {}}] * 8}, 1 << 30, "where")


def test_the_key_of_tables_cannot_be_a_field():
    for value in ({"$rows": 1}, [{"$rows": 1}, {"$rows": 2}]):
        with pytest.raises(ValueError, match="reserved"):
            columns.to_text({"rows": value})
