"""What can never be parity, end to end: NaN and infinity, a missing tap, a wrong shape, an empty trace."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import crossval
from crossval.model import taps
from tests.support.extra import sampled
from tests.support.strangers import run

PROMPT = "What is 2+2?"
LAYER = 2
KINDS = [f"blk.{LAYER}.{tap}" if tap in taps.LAYER_TAPS else tap for tap in taps.of_graph(None)]
OUTLINE = ("inp_embd", f"blk.{LAYER}.l_out", "result_norm", "result_output")
PREFILL, DECODE, OUTLINE_ONLY = 0, 1, 2
"""Passes; of the last one the golden has the outline only."""
COMPUTED = ("ffn_gate", "kq", "result_output")
"""Taps where the engine itself may have such a value: what reads it can give ordinary numbers, or nothing reads
it. Anywhere else the value would propagate; as it does not, the recording is wrong."""
BOTH_PASSES = {kind for kind in KINDS if taps.parse(kind).tap in COMPUTED}

Arrays = dict[str, Any]


@pytest.fixture
def altered(short_golden, tmp_path) -> Callable[..., Path]:
    """Return a function that writes a copy of the golden with one pass changed, digests and all."""

    def make(index: int, change: Callable[[Arrays, list[dict[str, Any]]], None]) -> Path:
        folder = tmp_path / "trace"
        shutil.copytree(short_golden, folder)
        trace = json.loads((folder / "trace.json").read_text())
        trace["engine"] = {"name": "other"}
        one = trace["passes"][index]
        arrays = load_file(folder / one["file"])
        change(arrays, one["taps"])
        save_file(arrays, folder / one["file"])
        one["sha256"] = hashlib.sha256((folder / one["file"]).read_bytes()).hexdigest()
        (folder / "trace.json").write_text(json.dumps(trace))
        return folder

    return make


def judged(model: Path, candidate: Path, reference: Path, receipt: Path) -> tuple[int, dict[str, Any] | None]:
    """Return exit code and receipt."""
    result = run(
        "layers", "--prompt", PROMPT, "--model", model, "--candidate", candidate, "--reference", reference,
        "--receipt", receipt,
    )  # fmt: skip
    assert "Traceback" not in result.output
    return result.exit_code, crossval.open_receipt(receipt) if receipt.exists() else None


def verdict(model: Path, candidate: Path, reference: Path, receipt: Path) -> tuple[int, str | None]:
    code, made = judged(model, candidate, reference, receipt)
    return code, made and made["verdict"]


def test_the_copy_as_it_is_agrees(shipped_model, short_golden, altered, tmp_path):
    copy = altered(PREFILL, lambda arrays, entries: None)
    assert verdict(shipped_model, copy, short_golden, tmp_path / "r.json") == (0, "parity")


@pytest.mark.parametrize(
    ("side", "kind", "index"),
    sampled(
        [
            *(
                (side, kind, index)
                for i, kind in enumerate(KINDS)
                for j, side in enumerate(("candidate", "reference"))
                for index in (PREFILL, DECODE)
                if index == (PREFILL, DECODE)[(i + j) % 2] or kind in BOTH_PASSES
            ),
            *((side, kind, OUTLINE_ONLY) for side in ("candidate", "reference") for kind in OUTLINE),
        ],
        3,
        lambda case: (case[0], case[2], case[1] if case[1] in BOTH_PASSES else None),
    ),
)
def test_a_value_that_is_no_number(shipped_model, short_golden, altered, tmp_path, side, kind, index):
    """Every tap on each side and in each kind of pass; in both on both where the engine may have computed it."""
    value = (math.nan, math.inf, -math.inf)[KINDS.index(kind) % 3]

    def change(arrays: Arrays, entries: list[dict[str, Any]]) -> None:
        key = f"p{index}.{kind}"
        array = arrays[key].copy()
        array.reshape(-1)[0] = value  # of scores: the first token's first key, which is never masked
        arrays[key] = array

    trace = altered(index, change)
    pair = (trace, short_golden) if side == "candidate" else (short_golden, trace)
    code, made = judged(shipped_model, *pair, tmp_path / "r.json")
    assert made is not None
    first, wrongly = made["audit"][side]["first_guilty"], made["audit"][side].get("misrecorded", [])
    if taps.parse(kind).tap in COMPUTED:
        assert (code, made["verdict"], wrongly) == (1, f"{side}_defect", [])
        assert (first["tap"], first["pass_index"]) == (kind, index)
    else:
        assert (code, made["verdict"], first) == (3, "incomplete", None)
        assert [(one["taps"], one["passes"]) for one in wrongly] == [([kind], [index])]


@pytest.mark.parametrize("index", [PREFILL, DECODE])
@pytest.mark.parametrize("kind", OUTLINE)
def test_a_tap_that_is_missing(shipped_model, short_golden, altered, tmp_path, kind, index):
    def change(arrays: Arrays, entries: list[dict[str, Any]]) -> None:
        del arrays[f"p{index}.{kind}"]
        entries[:] = [entry for entry in entries if entry["name"] != kind]

    assert verdict(shipped_model, altered(index, change), short_golden, tmp_path / "r.json") == (3, "incomplete")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_that_is_wrong(shipped_model, short_golden, altered, tmp_path, kind):
    def change(arrays: Arrays, entries: list[dict[str, Any]]) -> None:
        key = f"p{PREFILL}.{kind}"
        arrays[key] = np.ascontiguousarray(arrays[key][..., :-1])
        next(entry for entry in entries if entry["name"] == kind)["shape"] = list(arrays[key].shape)

    code, found = verdict(shipped_model, altered(PREFILL, change), short_golden, tmp_path / "r.json")
    assert (code, found) == (4, None)  # refused as a malformed trace


def test_a_trace_of_nothing(shipped_model, short_golden, altered, tmp_path):
    def change(arrays: Arrays, entries: list[dict[str, Any]]) -> None:
        arrays.clear()
        entries.clear()

    folder = altered(PREFILL, change)
    trace = json.loads((folder / "trace.json").read_text())
    code, found = verdict(shipped_model, folder, short_golden, tmp_path / "r.json")
    assert (code, found) in ((3, "incomplete"), (4, None))
    trace["passes"] = []
    (folder / "trace.json").write_text(json.dumps(trace))
    code, found = verdict(shipped_model, folder, short_golden, tmp_path / "none.json")
    assert (code, found) in ((3, "incomplete"), (4, None))
