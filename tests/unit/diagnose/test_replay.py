"""A segment computed again: correctly, as a healthy engine recorded it; with a mistake, as a wrong one did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossval.audit.bounds import Arithmetic
from crossval.diagnose.replay import HeldWeights, Mistake, Mode, Replay
from crossval.diagnose.variants import Inapplicable, candidates
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord, TapArray
from tests.support.faulty_engine import FaultyRunner

PASSES = ([1019, 5, 900, 33, 7, 412], [77], [640])
PLAIN = Mode((("kq", 2), ("kqv_out", 2)))
"""An engine in NumPy rounds nothing to binary16."""
ALL = ("inp_embd", "attn_norm", "k", "v", "kq_soft_max", "ffn_inp", "ffn_gate", "ffn_act", "l_out")


@pytest.fixture(scope="module")
def weights(shipped_model: Path) -> SpecWeights:
    return SpecWeights(shipped_model)


def recorded(
    model: Path, fault: str | None = None, keep: tuple[str, ...] = ("inp_embd", "l_out")
) -> list[PassRecord]:
    engine = FaultyRunner(model, fault, {1})
    names = [name for name in taps.of_model(4) if taps.parse(name).tap in keep]
    return [engine.eval(ids, names) for ids in PASSES]


def replay(weights: SpecWeights, records: list[PassRecord], tap: str) -> Replay:
    table, arithmetic = op_table(weights.config), Arithmetic(FaultyRunner.identity.numerics, 4)
    return Replay(table, weights.config, HeldWeights(weights, ()), records, tap, arithmetic)


def distance(found: Replay, mistake: Mistake | None = None, probe: tuple[int, ...] | None = None) -> np.ndarray:
    computed = found.run(mistake, PLAIN, probe)
    assert computed is not None
    return found.distance(computed)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("keep", [("inp_embd", "l_out"), ALL])
def test_what_a_healthy_engine_did_not_record_is_computed(
    keep: tuple[str, ...], index: int, weights: SpecWeights, shipped_model: Path
) -> None:
    """Also after passes whose keys and values were not recorded."""
    records = recorded(shipped_model, keep=keep)[: index + 1]
    for name in records[-1].taps:
        if name != "inp_embd" and taps.parse(name).layer in (0, 3):
            assert np.median(distance(replay(weights, records, name))) < 1e-6, name


def test_a_segment_is_what_lies_between_recorded_tensors(weights: SpecWeights, shipped_model: Path) -> None:
    records = recorded(shipped_model, keep=("l_out", "kqv_out", "ffn_inp"))
    assert [op.output for op in replay(weights, records[:1], "blk.1.ffn_inp").segment] == [
        "blk.1.attn_sub_norm", "blk.1.attn_o_out", "blk.1.ffn_inp",
    ]  # fmt: skip
    found = replay(weights, records, "blk.1.kqv_out")
    assert [op.name for op in found.ops[0]] == ["attn_norm", "k", "v", "k_rope"]
    assert [op.name for op in found.segment][-3:] == ["kq", "kq_soft_max", "kqv_out"]
    few = {name: TapArray(tap.array[-1:], (5,)) for name, tap in records[0].taps.items()}
    with pytest.raises(Inapplicable):  # keys and values of the other tokens cannot be computed
        replay(weights, [replace(records[0], taps=few)], "blk.1.kqv_out").baseline(PLAIN)
    with pytest.raises(Inapplicable):
        replay(weights, records, "blk.1.q")


def made(found: Replay, op: str, name: str) -> Mistake:
    output = f"blk.1.{op}"
    (context,) = (found.context(one, PLAIN) for one in found.segment if one.output == output)
    return Mistake({output: next(one for one in candidates(context) if one.name == name)})


@pytest.mark.parametrize(
    ("fault", "op", "name"),
    [
        ("SiLU", "ffn_act", "SiLU"),
        ("no score scale", "kq_soft_max", "no scale"),
        ("truncation", "q", "truncation"),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_a_mistake_inside_gives_what_a_broken_engine_recorded(
    fault: str, op: str, name: str, index: int, weights: SpecWeights, shipped_model: Path
) -> None:
    records = recorded(shipped_model, fault)[: index + 1]
    found = replay(weights, records, "blk.1.l_out")
    right, wrong = distance(found), distance(found, made(found, op, name))
    if fault == "truncation":  # made in one of seven matrices only
        assert np.median(wrong) != np.median(right)
        return
    assert np.median(right) > 0.01
    assert np.median(wrong) < 1e-6
    # a mistake of the other kind of pass is none in this one
    other = "prefill" if index else "decode"
    elsewhere = replace(made(found, op, name), kind=other)
    assert index == 2 or found.run(elsewhere, PLAIN) is None


def test_some_tokens_are_the_same_as_all(weights: SpecWeights, shipped_model: Path) -> None:
    found = replay(weights, recorded(shipped_model, "SiLU")[:1], "blk.1.l_out")
    for op, name in (
        ("q_rope", "not rotated"),
        ("ffn_act", "SiLU"),
        ("ffn_down", "last n mod 4 tokens hold the one before"),
    ):
        mistake = made(found, op, name)
        some = distance(found, mistake, (0, 3, 5))
        np.testing.assert_allclose(some, distance(found, mistake)[[0, 3, 5]], rtol=1e-3)


def test_an_output_of_some_tokens_only(weights: SpecWeights, shipped_model: Path) -> None:
    """bitnet.cpp's last layer keeps only the last token."""
    (record, *_) = recorded(shipped_model)
    last = record.taps["blk.3.l_out"].array[-1:]
    cut = replace(record, taps={**record.taps, "blk.3.l_out": TapArray(last, (5,))})
    whole, found = (replay(weights, [one], "blk.3.l_out") for one in (record, cut))
    assert distance(found).shape == (1,)
    assert distance(found)[0] == distance(whole)[-1]


def test_ties_are_seen_where_they_reach(weights: SpecWeights, shipped_model: Path) -> None:
    """A tie in the inputs of keys affects every later token; in the feed-forward part only its own."""
    (record, *_) = recorded(shipped_model, keep=("attn_norm", "ffn_norm", "l_out"))
    x = np.tile(np.linspace(-0.3, 0.3, 256, dtype=np.float32), (6, 1))
    x[:, 0] = 127.0
    norms = {name: TapArray(x.copy()) for name in ("blk.1.attn_norm", "blk.1.ffn_norm")}
    for name, reached in (("blk.1.attn_norm", [2, 3, 4, 5]), ("blk.1.ffn_norm", [2])):
        taken = {name: TapArray(tap.array.copy()) for name, tap in norms.items()}
        before = replay(weights, [replace(record, taps={**record.taps, **taken})], "blk.1.l_out")
        without = set(np.flatnonzero(before.near_ties(None, PLAIN)))
        taken[name].array[2, 9] = 3.5
        found = replay(weights, [replace(record, taps={**record.taps, **taken})], "blk.1.l_out")
        assert set(np.flatnonzero(found.near_ties(None, PLAIN))) >= without | set(reached)
        assert (2 in without) is False
