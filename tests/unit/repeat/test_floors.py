"""Floors are what an engine really differs from itself by; margins are recomputed against the thresholds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossval.capture import Capture
from crossval.compare.rows import TapRow, compare_tap, row_status
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError, CrossvalError
from crossval.model import taps
from crossval.model import tolerance as tolerances
from crossval.model.tolerance import tolerance_for, violations
from crossval.passes import PassPlan, TapArray
from crossval.repeat.floors import CAPTURE, PREFILL_DECODE, Floor, FloorTable, measure_floors
from crossval.repeat.margins import multiples, smallest_tolerance, usage
from tests.support.compared import compare_layers
from tests.support.numpy_engine import CONFIG, MODEL, NumpyRunner, fault

TABLE = FloorTable("e", 3, (4,), (Floor("blk.0.q", "v", 0.01, 0.02, 8, 2), Floor("blk.0.k", "v", 0.0, 0.0, 8, 0)))
PROMPTS = [(3, 14, 15, 9, 26, 5), (1, 2, 3, 4)]


def scale(factor: float):  # type: ignore[no-untyped-def]
    return lambda x: x * np.float32(factor)


def measure(make=NumpyRunner, **options) -> FloorTable:
    return measure_floors(lambda **asked: make(), PROMPTS, n_layers=MODEL.n_layers, **options)


def test_every_tap_gets_a_floor_and_they_are_small_for_an_engine_that_is_right():
    table = measure(thread_counts=(2,))
    assert (table.engine, table.n_tokens, table.unmeasured) == ("numpy", (6, 4), ())
    assert {floor.tap for floor in table.floors} == set(taps.of_model(MODEL.n_layers))
    assert {floor.variation for floor in table.floors} == {PREFILL_DECODE, "2 threads", CAPTURE}
    assert all(floor.rel_l2 < 1e-5 and floor.n_elements > 0 for floor in table.floors)
    assert {floor.tap for floor in table.floors if floor.variation == CAPTURE} == {"result_output"}


def test_a_decode_path_that_rounds_otherwise_sets_the_floor_from_there_on():
    table = measure(lambda: NumpyRunner(fault("blk.1.attn_o_out", scale(1.01), kind="decode")))
    assert table.of("blk.1.attn_o_out", PREFILL_DECODE).rel_l2 == pytest.approx(0.01, rel=0.3)
    assert table.of("blk.1.kqv_out").rel_l2 < 1e-6 < table.of("blk.1.ffn_inp").rel_l2
    assert table.of("blk.0.l_out").rel_l2 < 1e-6


def test_another_number_of_threads_is_a_variation_of_its_own():
    def opened(n_threads: int | None = None) -> NumpyRunner:
        return NumpyRunner(fault("blk.2.ffn_up", scale(1.02)) if n_threads else None)

    table = measure_floors(opened, PROMPTS, n_layers=MODEL.n_layers, thread_counts=(2,))
    assert table.of("blk.2.ffn_up", "2 threads").rel_l2 == pytest.approx(0.02, rel=1e-3)
    assert table.of("blk.2.ffn_up", PREFILL_DECODE).rel_l2 < 1e-6
    assert table.of("blk.2.ffn_up").variation == "2 threads"
    assert table.of("blk.2.ffn_gate", "2 threads").n_different == 0


def test_capture_that_changes_the_logits_is_in_the_floor():
    class Observed(NumpyRunner):
        def eval(self, token_ids, select):
            record = super().eval(token_ids, select)
            if len(select) > 1 and "result_output" in record.taps:
                tap = record.taps["result_output"]
                return replace(
                    record, taps={**record.taps, "result_output": TapArray(tap.array * np.float32(1.1), tap.rows)}
                )
            return record

    assert measure(Observed).of("result_output", CAPTURE).rel_l2 == pytest.approx(0.1, rel=1e-3)


def test_layers_are_measured_in_groups_and_all_of_them(monkeypatch):
    whole = measure()
    monkeypatch.setattr("crossval.capture.MAX_BYTES", 1)
    runner = NumpyRunner()
    grouped = measure_floors(lambda **asked: runner, PROMPTS, n_layers=3)
    assert grouped == whole
    layers = [{taps.parse(name).layer for name in select if name.startswith("blk.")} for _, select in runner.evals]
    assert max(map(len, (group for group in layers if "blk.0.l_out" not in group))) <= 3
    assert {frozenset(group) for group in layers} >= {frozenset({0}), frozenset({1}), frozenset({2})}


def test_a_model_without_sub_norms_is_measured_whole():
    table = measure(lambda: NumpyRunner(sub_norms=False))
    assert table.unmeasured == ()
    assert table.of("blk.0.attn_sub_norm") is None


def test_what_an_engine_does_not_give_is_said():
    table = measure(lambda: NumpyRunner(lacks=["blk.1.q"]))
    assert [(tap, variation) for tap, variation, _ in table.unmeasured] == [("blk.1.q", PREFILL_DECODE)]
    assert table.of("blk.1.q") is None


def test_an_engine_that_gives_nan_has_no_floor():
    with pytest.raises(CrossvalError, match=r"no floor: blk\.1\.ffn_up.*NaN"):
        measure(lambda: NumpyRunner(fault("blk.1.ffn_up", lambda x: x * np.float32(np.nan))))


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([], {}),
        ([(1, 2, 3)], {}),
        ([(1, 2, 3, 4), (1,)], {}),
        (PROMPTS, {"n_layers": 0}),
        (PROMPTS, {"n_decode": -1}),
    ],
)
def test_nothing_to_measure_is_an_error(prompts, options):
    with pytest.raises(BadInputError):
        measure_floors(lambda **asked: NumpyRunner(), prompts, **{"n_layers": 3, **options})


def test_a_trace_has_no_floor(tmp_path):
    record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=PROMPTS[0], prompt_text="p", n_decode=1)
    with pytest.raises(BadInputError, match="recorded trace"):
        measure(lambda: RecordedRunner(tmp_path / "t"))


def test_floors_of_the_engine_on_the_five_layers(five_layers):
    """Threads never change bits; token by token differs from layer 0's KQV on, less than the general table."""
    table = measure_floors(
        lambda **asked: BitnetPyRunner(five_layers, **asked),
        [tuple(range(5, 17))],
        n_layers=5,
        thread_counts=(1, 2),
    )
    assert all(floor.n_different == 0 for floor in table.floors if floor.variation != PREFILL_DECODE)
    exact = {"attn_norm", "q", "k", "v", "q_rope", "k_rope", "kq", "kq_soft_max"}
    for tap in exact:
        assert table.of(f"blk.0.{tap}").n_different == 0
    kqv = table.of("blk.0.kqv_out")
    assert 0 < kqv.rel_l2 < 2.0**-11
    for floor in table.floors:
        assert floor.rel_l2**2 <= tolerance_for(floor.tap, 5, "independent").bound["nmse"]
    assert table.of("blk.4.l_out").rel_l2 > table.of("blk.0.l_out").rel_l2 > 0


# --- as JSON --------------------------------------------------------------------------------------------------

distances = st.floats(0, 1e9, allow_nan=False)
tap_names = st.sampled_from(taps.of_model(3))
floors = st.builds(Floor, tap_names, st.text(max_size=9), distances, distances, st.integers(0), st.integers(0))
tables = st.builds(
    FloorTable,
    st.text(max_size=9),
    st.integers(0, 99),
    st.lists(st.integers(0, 99), max_size=3).map(tuple),
    st.lists(floors, max_size=4).map(tuple),
    st.lists(st.tuples(tap_names, st.text(max_size=5), st.text(max_size=5)), max_size=2).map(tuple),
)


@given(tables)
def test_a_table_survives_json(table):
    assert FloorTable.from_json(json.loads(json.dumps(table.to_json()))) == table


# --- margins --------------------------------------------------------------------------------------------------


def row(error: float, tap: str = "blk.0.q", seed: int = 0) -> TapRow:
    """Return a row whose relative L2 difference is about ``error``."""
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((4, 2, 8) if tap.endswith("q") else (4, 16)).astype(np.float32)
    noise = rng.standard_normal(r.shape)
    c = (r + error * noise * np.linalg.norm(r) / np.linalg.norm(noise)).astype(np.float32)
    found = compare_tap(
        tap, 0, PassPlan("prefill", (1, 2, 3, 4), 0), TapArray(c), TapArray(r), tolerance_for(tap, 3, "same")
    )
    assert isinstance(found, TapRow)
    return found


def test_multiples_of_the_floor():
    assert multiples(row(0.05), TABLE).times == pytest.approx(5.0, rel=1e-3)
    assert multiples(row(0.05), TABLE).text == "5 times the floor"
    equal = multiples(row(0.0), TABLE)
    assert (equal.times, equal.text) == (0.0, "equal")
    repeats = replace(TABLE, floors=(Floor("blk.0.q", "v", 0.0, 0.0, 8, 0),))
    assert multiples(row(0.05), repeats).times is None
    assert "bit for bit" in multiples(row(0.05), repeats).text
    assert multiples(row(0.0), repeats).times == 0.0
    assert multiples(row(0.05, "blk.1.l_out"), TABLE).text == "no floor was measured"
    broken = replace(row(0.05), max_abs=None, nmse=None)
    assert multiples(broken, TABLE).text == "not comparable"


@given(
    st.floats(1e-6, 0.9),
    st.integers(0, 30),
    st.sampled_from(["blk.0.q", "blk.1.l_out", "blk.2.ffn_up", "result_output"]),
)
def test_usage_is_where_the_verdict_turns(error, seed, tap):
    """At ``usage`` times the bound in force the row passes, at a little less it does not."""
    found = row(error, tap, seed)
    used = usage(found)
    assert used is not None
    assert (row_status(found) == "within") == (used <= 1.0) or used == pytest.approx(1.0)
    base = dict(found.bound)

    def scaled(factor: float) -> dict[str, float]:
        e = factor * math.sqrt(base["nmse"])
        token = factor * math.sqrt(base["worst_token_nmse"])
        return {
            "cosine": math.sqrt(max(0.0, 1 - e * e)), "worst_token_cosine": math.sqrt(max(0.0, 1 - token * token)),
            "nmse": e * e, "worst_token_nmse": token * token, "norm_ratio": factor * base["norm_ratio"],
        }  # fmt: skip

    assert not violations(found, scaled(used * (1 + 1e-6) + 1e-7))
    if math.isfinite(used):
        assert violations(found, scaled(used * 0.999 - 1e-7))


def test_smallest_tolerance_is_the_smallest(monkeypatch):
    wrong = NumpyRunner(fault("blk.1.ffn_down", scale(1.08)))
    sources = (Capture(engine, CONFIG) for engine in (wrong, NumpyRunner()))
    rows = compare_layers(*sources, PROMPTS[0], full=True, n_decode=1).rows
    smallest = smallest_tolerance(rows)
    assert smallest.factor is not None
    assert smallest.factor > 1.0
    assert smallest.tap is not None
    assert smallest.by_class["exact"] == 0.0
    assert max(smallest.by_class.values()) == smallest.factor
    floor = tolerances.FLOOR_PER_SQRT_LAYER["same"]
    for share, passes in ((1.0001, True), (0.999, False)):
        needed = share * smallest.factor * floor
        monkeypatch.setitem(tolerances.FLOOR_PER_SQRT_LAYER, "same", needed)
        broken = [r for r in rows if r.status != "equal" and violations(r, tolerance_for(r.tap, 3, "same").bound)]
        assert (not broken) == passes


def test_no_tolerance_would_do():
    nan = replace(row(0.1), max_abs=None, nmse=None, note="candidate holds 1 NaN or infinite values")
    assert smallest_tolerance([row(0.1), nan]).factor is None
    assert "NaN" in smallest_tolerance([nan]).note
    opposite = row(2.0, "blk.1.l_out")
    flipped = replace(opposite, cosine=-0.2)
    assert usage(flipped) == math.inf
    assert smallest_tolerance([flipped]).factor is None
    embedding = compare_tap(
        "inp_embd", 0, PassPlan("prefill", (1,), 0), TapArray(np.full((1, 4), 1.01, np.float32)),
        TapArray(np.ones((1, 4), np.float32)), tolerance_for("inp_embd", 3, "same"),
    )  # fmt: skip
    assert smallest_tolerance([embedding]).factor is None
    assert usage(replace(row(0.1), bound={})) == math.inf
    assert usage(replace(row(0.1), bound={"mystery": 1.0})) == math.inf


def test_equal_rows_need_no_tolerance_and_no_rows_are_an_error():
    assert smallest_tolerance([row(0.0)]).factor == 0.0
    with pytest.raises(BadInputError, match="nothing was compared"):
        smallest_tolerance([])
