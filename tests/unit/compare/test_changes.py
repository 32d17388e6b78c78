"""What changed between two snapshots of one engine, operation by operation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from crossval.compare.changes import changes
from crossval.errors import BadInputError
from crossval.passes import PassRecord, TapArray
from crossval.traces.read import Trace
from crossval.traces.write import TraceWriter
from tests.support.strangers import run


@pytest.fixture
def snapshot(golden: Path, tmp_path: Path):
    """Return ``snapshot(name, change=None, n_passes=None, without=())``: a copy of a trace with changed arrays."""
    given = Trace.open(golden)

    def make(name: str, change=None, n_passes: int | None = None, without=()) -> Path:
        info = given.info
        with TraceWriter(tmp_path / name, info.model) as writer:
            for index, one in enumerate(info.passes[:n_passes]):
                taps = {tap: array for tap, array in given.taps(index).items() if tap not in without}
                if change is not None:
                    taps = {
                        tap: TapArray(change(index, tap, array.array.copy()), array.rows)
                        for tap, array in taps.items()
                    }
                writer.add_pass(PassRecord(one.plan, taps))
            writer.finish(engine=info.engine, prompt_ids=info.prompt_ids, prompt_text=info.prompt_text)
        return tmp_path / name

    return make


def of(before: Path, after: Path):
    return changes(Trace.open(before), Trace.open(after))


def scaled(place: tuple[int, str], factor: float):
    def change(index: int, tap: str, array: np.ndarray) -> np.ndarray:
        return array * np.float32(factor) if (index, tap) == place else array

    return change


def test_a_copy_has_no_change(golden, snapshot):
    found = of(golden, snapshot("after"))
    assert found.first is None
    assert all(one.equal == one.compared > 0 and one.largest is None for one in found.ops)
    assert found.held == (found.n_passes, found.n_passes)
    held = Trace.open(golden).info.passes
    assert sum(one.equal for one in found.ops) == sum(len(one.taps) for one in held)


@pytest.mark.parametrize(
    ("factor", "where"), [(1 + 2e-7, "within_floor"), (1.2, "beyond"), (float("nan"), "beyond")]
)
def test_one_changed_tap_is_counted_placed_and_measured(golden, snapshot, factor, where):
    found = of(golden, snapshot("after", scaled((1, "blk.1.ffn_out"), factor)))
    changed = [one for one in found.ops if one.largest is not None]
    assert [one.op for one in changed] == ["ffn_out"]
    assert getattr(changed[0], where) == 1
    assert changed[0].equal == changed[0].compared - 1
    assert found.first == changed[0].largest
    assert (found.first.pass_index, found.first.tap) == (1, "blk.1.ffn_out")
    if np.isfinite(factor):
        assert found.first.nmse == pytest.approx((1 - 1 / np.float32(factor)) ** 2, rel=0.2)


@pytest.mark.parametrize(("of_floor", "where"), [(0.8, "within_floor"), (1.2, "within")])
def test_the_floor_divides_what_is_within_the_bounds(golden, snapshot, of_floor, where):
    floor = of(golden, snapshot("first", scaled((0, "blk.0.q"), 1.001))).first.floor

    def noise(index: int, tap: str, array: np.ndarray) -> np.ndarray:
        if (index, tap) != (0, "blk.0.q"):
            return array
        signs = np.random.default_rng(1).choice([-1, 1], array.shape)
        return (array * (1 + np.sqrt(of_floor * floor) * signs)).astype(np.float32)

    found = of(golden, snapshot("after", noise))
    (one,) = [one for one in found.ops if one.largest]
    assert (one.op, getattr(one, where), one.beyond) == ("q", 1, 0)


def test_the_first_and_the_largest_change_are_two_things(golden, snapshot):
    def change(index: int, tap: str, array: np.ndarray) -> np.ndarray:
        small, large = (0, "blk.1.ffn_out"), (1, "blk.0.ffn_out")
        return scaled(large, 2.0)(index, tap, scaled(small, 1.001)(index, tap, array))

    found = of(golden, snapshot("after", change))
    (one,) = [one for one in found.ops if one.largest is not None]
    assert (found.first.pass_index, found.first.tap) == (0, "blk.1.ffn_out")
    assert (one.largest.pass_index, one.largest.tap) == (1, "blk.0.ffn_out")


def test_operations_come_in_the_order_of_execution(golden):
    ops = [one.op for one in of(golden, golden).ops]
    assert ops[:3] == ["inp_embd", "attn_norm", "q"]
    assert ops[-3:] == ["l_out", "result_norm", "result_output"]


def test_the_shorter_is_compared_and_what_only_one_holds_is_named(golden, snapshot):
    after = snapshot("after", n_passes=1, without=("blk.0.q", "blk.1.q"))
    found = of(golden, after)
    assert (found.n_passes, found.held) == (1, (len(Trace.open(golden).info.passes), 1))
    assert found.only == (("q",), ())
    assert of(after, golden).only == ((), ("q",))


def test_passes_fed_other_tokens_are_not_compared(golden, record):
    other = record(name="other", prompt="Another one")
    found = of(golden, other)
    assert (found.n_passes, found.ops, found.first) == (0, (), None)


def test_the_command_lists_changes_below_its_verdict(model_path, golden, snapshot):
    after = snapshot("after", scaled((0, "blk.1.ffn_out"), 1.2))
    result = run("diff", golden, after, "--model", model_path)
    assert result.exit_code == 3, result.output  # what follows fits the unchanged array: it was recorded wrongly
    assert f"What changed from {golden.name} to after" in result.stdout
    assert "first changed: blk.1.ffn_out in pass 0 (prefill)" in result.stdout
    assert "every stated fact is the same" in result.stdout
    same = run("diff", golden, snapshot("same"), "--model", model_path)
    assert "first changed: none, every value that both hold is bit-identical" in same.stdout


def test_a_damaged_pass_is_no_unchanged_one(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "damaged")
    file = next((tmp_path / "damaged").glob("pass-0000*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInputError, match="pass-0000"):
        of(golden, tmp_path / "damaged")
