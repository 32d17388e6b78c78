"""Recordings of other tokens, in another order or of other shapes: the arrays show what they really hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossval.model import taps
from crossval.passes import short_list
from crossval.receipts import file as receipt
from tests.support.rewritten import Passes
from tests.support.strangers import error_line, run

Record = Callable[..., Path]
Judged = Callable[..., tuple[int, receipt.Receipt, str]]


def edited(source: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """Copy a trace and edit its ``trace.json``."""
    shutil.copytree(source, target)
    stated = json.loads((target / "trace.json").read_text())
    edit(stated)
    (target / "trace.json").write_text(json.dumps(stated))
    return target


def test_passes_in_another_order_are_put_back(judged: Judged) -> None:
    def change(passes: Passes) -> None:
        passes[1], passes[2] = passes[2], passes[1]

    without_scores = [n for n in taps.of_model(2) if taps.parse(n).tap not in ("kq", "kq_soft_max")]
    code, made, text = judged(change, names=without_scores)
    assert (code, made["verdict"]) == (3, "incomplete"), text
    (found,) = made["audit"]["candidate"]["misrecorded"]
    assert (found["kind"], found["passes"]) == ("order", [1, 2])
    assert "RECORDED INCORRECTLY: the order of passes 1 and 2; the arrays of pass 1 fit pass 2; " in text
    assert made["audit"]["candidate"]["first_guilty"] is None


def test_scores_tell_of_the_order_by_their_shape(model_path: Path, record: Record, tmp_path: Path) -> None:
    def exchange(stated: Any) -> None:
        one, two = stated["passes"][1:]
        one["taps"], two["taps"] = two["taps"], one["taps"]

    source = record("other")
    wrong = edited(source, tmp_path / "t", exchange)
    line = error_line(run("diff", wrong, source, "--model", model_path))
    assert "blk.0.kq has shape [2, 1, 9], the model and rows give [2, 1, 8]: it has 9 keys" in line
    assert "pass 2 sees 9 keys: are the passes in another order?" in line


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            [2, 7, 8],
            "e cells of positions 0 to 6 (array[:, :, :7]); pass 1 sees 8 keys",
        ),
        ([2, 7, 32], "holds 25 cells more; cut the last axis to the cells of positions 0 to 6 (array[:, :, :7])"),
        ([2, 7, 6], "it has 6 keys, the tokens so far are 7: cells of the KV cache are missing"),
        ([7, 2, 7], "the axes are in another order: write (head, token, key), the last running fastest"),
        ([14, 7], "the number of values is correct: reshape it to [2, 7, 7]"),
    ],
)
def test_scores_of_another_shape_are_explained(
    model_path: Path, record: Record, tmp_path: Path, shape: list[int], words: str
) -> None:
    def reshape(stated: Any) -> None:
        (tap,) = (tap for tap in stated["passes"][0]["taps"] if tap["name"] == "blk.1.kq_soft_max")
        tap["shape"] = shape

    wrong = edited(record("other"), tmp_path / "t", reshape)
    result = run("diff", wrong, record(), "--model", model_path)
    assert result.exit_code == 4
    assert words in error_line(result)


def retold(source: Path, target: Path, ids: Callable[[list[int]], list[int]]) -> Path:
    """Copy a trace and state other token ids of its prompt."""

    def state(stated: Any) -> None:
        stated["prompt"]["token_ids"] = stated["passes"][0]["token_ids"] = ids(stated["prompt"]["token_ids"])

    return edited(source, target, state)


def test_a_recording_of_another_prompt_names_its_tokens(model_path: Path, record: Record, tmp_path: Path) -> None:
    others = [1, 17, 42, 250, 3, 99, 8, 77, 5, 41, 63, 128]
    source = record("other", prompt="Hello three")
    fed = json.loads((source / "trace.json").read_text())["prompt"]["token_ids"]
    wrong = retold(source, tmp_path / "t", lambda ids: [ids[0], *others[: len(ids) - 1]])
    given = json.loads((wrong / "trace.json").read_text())["prompt"]["token_ids"]
    result = run("diff", wrong, wrong, "--model", model_path, "--receipt", tmp_path / "r.json")
    assert result.exit_code == 3, result.output
    made = receipt.read(tmp_path / "r.json")
    (found,) = made["audit"]["candidate"]["misrecorded"]
    assert (found["kind"], found["passes"]) == ("tokens", [0])
    said = f"inp_embd of pass 0 belongs to token ids {short_list(fed)}, not {short_list(given)}"
    assert said in result.stdout
    assert "RECORDED INCORRECTLY: the tokens of pass 0; " in result.stdout


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (lambda token: token - 1, ["row of token id +1"]),
        (
            lambda token: 300 - 1 - token,
            ["undetermined: no known bug explains it", "inp_embd of pass 0 belongs to token ids ["],
        ),
    ],
    ids=["next", "odd"],
)
def test_an_engine_that_looks_up_other_rows_stays_wrong(
    model_path: Path, record: Record, tmp_path: Path, row: Callable[[int], int], words: list[str]
) -> None:
    wrong = retold(record("other"), tmp_path / "t", lambda ids: [row(token) for token in ids])
    result = run("diff", wrong, wrong, "--model", model_path)
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.stdout
