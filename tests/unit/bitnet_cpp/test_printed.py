"""What llama.cpp's tools print is read value by value; ``tests/data/printed`` is of real libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossval.bitnet_cpp.printed import parse
from crossval.errors import BadInputError

DATA = Path(__file__).parents[2] / "data" / "printed"
SMALL = """ggml_debug:   x-0 = (f32)   ADD(a{7, 2, 1, 1}, b{7, 2, 1, 1}}) = {7, 2, 1, 1}
  [
   [
    [ 0.0000, 1.0000, -2.5000, ..., 4.0000, nan, -inf],
    [ 7.0000, 8.0000, 9.0000, ..., 10.0000, 11.0000, 12.0000],
   ],
  ]
  sum = 123.456789
"""


@pytest.mark.parametrize("name", ["march", "main"])
def test_every_tensor_of_a_real_dump_is_read(name: str) -> None:
    text = (DATA / f"{name}.txt").read_text()
    found = list(parse(text, name))
    assert len(found) == sum(" = (f32) " in line for line in text.splitlines()) >= 14
    by_name = {(one.node, one.op): one for one in found}
    last = by_name["result_output", "MUL_MAT"]
    assert last.values.shape == (1, 1, 1, 1024)
    assert last.known.sum() == 6
    turned = by_name["Qcur-0", "ROPE"]
    assert turned.values.shape == (1, 8, 4, 64)
    assert turned.known.sum() == 6 * 4 * 6
    assert not turned.values[~turned.known].any()


def test_values_are_put_where_they_belong() -> None:
    (one,) = parse(SMALL, "it")
    row = one.values[0, 0]
    np.testing.assert_array_equal(row[0], np.array([0, 1, -2.5, 0, 4, np.nan, -np.inf], np.float32))
    np.testing.assert_array_equal(row[1], [7, 8, 9, 0, 10, 11, 12])
    np.testing.assert_array_equal(one.known[0, 0, 0], [True, True, True, False, True, True, True])


def test_other_types_and_other_lines_are_passed_over() -> None:
    half = SMALL.replace("(f32)", "(f16)")
    text = f"llama_model_loader: - kv 0: x = (1)\n{half}build: 1.0000\n{SMALL}"
    assert len(list(parse(text, "it"))) == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no tensor of llama-eval-callback or llama-debug"),
        (SMALL.replace(" 9.0000,", ""), "x-0 is not printed whole: 2 rows of 11 values, expected 2 of 6 each"),
        (SMALL[: SMALL.index("[ 7.0000")], "not printed whole: 1 rows"),
        (SMALL.replace("= {7, 2, 1, 1}", "= {7, 3, 1, 1}"), "not printed whole"),
        (SMALL.replace("= {7, 2, 1, 1}", "= {99999999, 9999999, 1, 1}"), "has the shape"),
        (SMALL.replace("= {7, 2, 1, 1}", "= {0, 2, 1, 1}"), "has the shape"),
    ],
)
def test_a_dump_that_is_cut_is_refused(text: str, match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        list(parse(text, "it"))
