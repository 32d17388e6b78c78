"""Tables in blocks against the checkpoint's: right ones pass by the criterion of their type, others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import crossval
from bitnet_py import quantize as quantizer
from bitnet_py.ggml_types import GGMLType
from crossval import registry
from crossval.receipts import gate
from crossval.receipts.file import Receipt, seal
from crossval.weights.blocks import CRITERIA, Tally
from tests.support.checkpoints import Small
from tests.support.tables import pack_q3_k, pack_q6_k

Rows = npt.NDArray[np.uint8]
ENDS = {"Q6_K": (32, 128), "Q3_K": (4, 32)}
"""Largest code and largest scale, both negative."""


def k_quants(values: npt.NDArray[np.float32], kind: str) -> Rows:
    """Return rows of a type with searched scales: here those that the largest value gives, a tenth larger."""
    top, most = ENDS[kind]
    parts = values.reshape(-1, 16, 16)
    at = np.abs(parts).argmax(axis=2)[..., None]
    scales = 1.1 * np.take_along_axis(parts, at, 2)[..., 0] / -top
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], 1)
    d = (largest[:, 0] / -most).astype("<f2")
    inverse = np.divide(1, d.astype(np.float32), out=np.zeros(len(d), np.float32), where=d != 0)
    factors = np.clip(np.rint(scales * inverse[:, None]), -most, most - 1).astype(np.int8)
    units = (d.astype(np.float32)[:, None] * factors)[..., None]
    codes = np.rint(np.divide(parts, units, out=np.zeros_like(parts), where=units != 0))
    codes = np.clip(codes, -top, top - 1).astype(np.int64).reshape(-1, 256)
    pack = pack_q6_k if kind == "Q6_K" else pack_q3_k
    return pack(codes, factors, d).reshape(len(values), -1)


def in_blocks(values: npt.NDArray[np.float32], kind: str) -> Rows:
    if kind in ENDS:
        return k_quants(values, kind)
    return np.asarray(gguf.quantize(values, gguf.GGMLQuantizationType[kind])).view(np.uint8)


def outcome(rows: Rows, values: npt.NDArray[np.float32], kind: str) -> tuple[str, int]:
    tally = Tally(gguf.GGMLQuantizationType[kind])
    for first in range(0, len(values), 3):
        tally.add(rows[first : first + 3], values[first : first + 3])
    return tally.outcome


def some_values(seed: int = 0) -> npt.NDArray[np.float32]:
    """Return rows of different sizes, one of zeros, with single values far larger than their neighbours."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((8, 512)) * 2.0 ** rng.integers(-6, 2, (8, 1))
    values[3] = 0
    values[4, ::37] *= 30
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_right_table(kind: str, narrow: bool) -> None:
    values = some_values()
    held = values.astype(np.float16).astype(np.float32) if narrow else values
    criterion, n_different = outcome(in_blocks(held, kind), values, kind)
    assert (criterion, n_different) == (CRITERIA[kind][0], 0)


@pytest.mark.parametrize("kind", CRITERIA)
def test_a_table_of_other_values(kind: str) -> None:
    values = some_values()
    other = np.roll(values, 1, axis=0)
    for wrong in (other, -values, values * np.float32(1.5), np.roll(values, 1, axis=1)):
        _, n_different = outcome(in_blocks(np.ascontiguousarray(wrong), kind), values, kind)
        assert n_different > values.size // 20


@pytest.mark.parametrize(("kind", "at"), [("Q8_0", 2), ("Q4_0", 2), ("Q5_0", 6), ("Q6_K", 0), ("Q3_K", 32)])
def test_one_code_off_by_one(kind: str, at: int) -> None:
    values = some_values(1)
    rows = in_blocks(values, kind).copy()
    rows[0, at] ^= 1
    criterion, n_different = outcome(rows, values, kind)
    assert n_different == 1
    assert criterion == CRITERIA[kind][-1]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_a_tie_that_another_build_rounds_otherwise_is_within_half_a_step(kind: str) -> None:
    top = 8 if kind == "Q4_0" else 16
    values = np.full((1, 32), 0.5, np.float32)  # half a step at a step of 1
    values[0, 0] = -top
    rows = in_blocks(values, kind).copy()
    assert outcome(rows, values, kind) == ("requantised", 0)
    rows[0, 3 if kind == "Q4_0" else 7] -= 1  # the next smaller code of one value
    assert outcome(rows, values, kind) == ("half a step", 0)


def test_only_the_scale_of_a_block_changed() -> None:
    values = some_values(2)
    for kind, at in (("Q8_0", 0), ("Q6_K", 208), ("Q3_K", 108), ("TQ2_0", 64)):
        rows = in_blocks(values, kind).copy()
        step = rows[0, at : at + 2].view("<f2")
        step *= np.float16(1.5)
        assert outcome(rows, values, kind)[1] > 5, kind


def test_values_beyond_what_a_search_can_leave() -> None:
    values = some_values(3)
    rows = in_blocks(values, "Q6_K").copy()
    blocks = rows.reshape(-1, 210)
    blocks[0, 208:].view("<f2")[:] /= np.float16(64)  # all codes at an end
    blocks[0, :128], blocks[0, 128:192] = 0, 0
    flipped = np.sign(np.repeat(blocks[0, 192:208].view(np.int8), 16)) * -1
    values[0, :256] = np.abs(values[0, :256]) * flipped
    assert outcome(rows, values, "Q6_K")[1] > 200


Written = tuple[Path, Path]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a writer of a model file whose tables are of a type, made of the values that a function returns."""

    def written(kind: str, change: Any = lambda model, source: None) -> Written:
        small = Small(tied=False, n_layers=1)
        folder = small.write(tmp_path / kind)
        data = quantizer._data
        monkeypatch.setattr(quantizer, "TYPES", {**quantizer.TYPES, "table": GGMLType[kind]})

        def tables(model: Any, source: Any) -> Any:
            if source.role != "table":
                return data(model, source)
            name = change(model, source) or source.name
            return in_blocks(small.values(name).astype(np.float32), kind).view(np.int8)

        monkeypatch.setattr(quantizer, "_data", tables)
        quantizer.quantize(folder, folder / "m.gguf")
        monkeypatch.undo()
        return folder, folder / "m.gguf"

    return written


def tables_of(receipt: Receipt) -> list[dict[str, Any]]:
    return [row for row in receipt["results"]["rows"] if row["expected"]["role"] == "table"]


@pytest.mark.parametrize("kind", CRITERIA)
def test_the_command_compares_them(write: Any, kind: str) -> None:
    folder, file = write(kind)
    receipt = crossval.check_weights(file, against=folder)
    assert (receipt.verdict, receipt["results"]["findings"]) == ("pass", [])
    assert receipt["coverage"]["required"] == receipt["coverage"]["compared"]
    assert [row["compared"]["criterion"] for row in tables_of(receipt)] == [CRITERIA[kind][0]] * 2
    assert gate.passed(registry.judge(receipt))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_embedding_and_head_exchanged_are_named(write: Any, kind: str) -> None:
    names = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
    folder, file = write(kind, lambda model, source: names[source.name])
    found = crossval.check_weights(file, against=folder)["results"]["findings"]
    assert {(one["subject"], one["aspect"], one["cause"]) for one in found} == {
        ("token_embd.weight", "values", "holds output.weight"),
        ("output.weight", "values", "holds token_embd.weight"),
    }


@pytest.mark.parametrize("criterion", [None, "requantised"])
def test_a_receipt_that_names_another_criterion_fails(write: Any, criterion: str | None) -> None:
    folder, file = write("Q6_K")
    receipt = crossval.check_weights(file, against=folder)
    tables_of(receipt)[0]["compared"]["criterion"] = criterion
    failed = [check.name for check in registry.judge(seal(receipt)) if not check.passed]
    assert failed == ["tensors"]
