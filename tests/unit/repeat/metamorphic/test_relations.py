"""Every relation must hold for a healthy engine and break for an engine that violates it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crossval.compare.rerun import Names
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError, EngineCrashError, UnavailableError
from crossval.model import taps
from crossval.passes import PassPlan, PassRecord, TapArray
from crossval.repeat.metamorphic.cases import MetamorphicOptions, PlannedCheck
from crossval.repeat.metamorphic.notebook import (
    MetamorphicCheck,
    MetamorphicResult,
    Notebook,
    check_status,
    decide,
)
from crossval.repeat.metamorphic.relations import enough_tokens, run_metamorphic
from crossval.repeat.metamorphic.runs import Recorded
from crossval.repeat.metamorphic.scope import Form
from tests.support.families import FAMILIES
from tests.support.numpy_engine import MODEL, NumpyRunner

LENGTHS = (2, 5)
IDS = enough_tokens([], MODEL.vocab_size, 32)
Fault = Callable[["RowRunner", str, np.ndarray, PassPlan], np.ndarray]


@functools.cache
def _weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return NumpyRunner(seed=seed).weight(name, *shape)


class RowRunner(NumpyRunner):
    """The NumPy engine computing one token after the other, so that its bits do not depend on the pass.

    ``fault`` sees the runner, with the whole pass as ``runner.whole``, and one token's row at a time.
    """

    def __init__(self, fault: Fault | None = None, **options: Any) -> None:
        self.options = {name: options.pop(name) for name in ("n_threads", "kernel") if name in options}
        super().__init__(
            None if fault is None else lambda name, row, plan: fault(self, name, row, plan), **options
        )
        self.identity = replace(self.identity, settings=self.options)
        self.whole = PassPlan("prefill", (), 0)

    def weight(self, name: str, *shape: int) -> np.ndarray:
        return _weight(self._seed, name, shape)

    def _forward(self, plan: PassPlan) -> dict[str, np.ndarray]:
        self.whole = plan
        pieces = [
            super(RowRunner, self)._forward(PassPlan(plan.kind, (token,), position))
            for token, position in zip(plan.token_ids, plan.positions, strict=True)
        ]
        whole = {}
        for name in pieces[0]:
            rows = [piece[name] for piece in pieces]
            if name.endswith(("kq", "kq_soft_max")):
                n_kv = rows[-1].shape[-1]
                rows = [np.pad(row, [(0, 0), (0, 0), (0, n_kv - row.shape[-1])]) for row in rows]
            whole[name] = np.concatenate(
                rows, axis=1 if rows[0].ndim == 3 and "kq" in name and "kqv" not in name else 0
            )
        return whole


def check(
    fault: Fault | None = None,
    options: MetamorphicOptions | None = None,
    **runner: Any,
) -> MetamorphicResult:
    options = options or MetamorphicOptions(lengths=LENGTHS, thread_counts=(1, 3), kernels=("b",))
    result = run_metamorphic(
        lambda **asked: RowRunner(fault, **asked, **runner),
        IDS,
        n_layers=MODEL.n_layers,
        options=options,
    )
    assert all(c.status == check_status(c) for c in result.checks)
    return result


def failed(result: MetamorphicResult) -> list[MetamorphicCheck]:
    return [c for c in result.checks if c.status == "failed"]


def relations(checks: Sequence[MetamorphicCheck]) -> set[str]:
    return {c.name for c in checks}


def test_a_healthy_engine_holds_every_relation_bit_for_bit():
    result = check(options=MetamorphicOptions(lengths=(1, 2, 3, 5, 7), kernels=("a", "b")))
    assert (result.verdict, result.side, result.engine) == ("holds", "candidate", "numpy")
    assert relations(result.checks) == {"one_by_one", "prefix", "split", "reset", "capture", "threads", "kernels"}
    assert all(c.n_compared > 0 and c.n_different == 0 for c in result.checks)
    assert len({(c.name, c.case) for c in result.checks}) == result.n_required == len(result.checks)


def test_an_engine_whose_last_layer_gives_output_rows_only_holds_too():
    assert check(last_rows=True).verdict == "holds"


def test_an_engine_without_sub_norms_holds_too():
    assert check(sub_norms=False).verdict == "holds"


def test_an_engine_that_states_no_arithmetic_is_held_to_the_floor_where_passes_differ():
    result = check(simd_width=None)
    assert result.verdict == "holds"
    expected = {c.name: c.expectation for c in result.checks if c.case != "1 token"}
    assert expected == {
        "one_by_one": "floor", "prefix": "floor", "split": "floor",
        "reset": "bits", "capture": "bits", "threads": "bits", "kernels": "bits",
    }  # fmt: skip


def test_wrong_last_columns_of_a_batch_break_prefix_and_name_the_operation():
    def last_columns(runner, name, row, plan):
        n = len(runner.whole.token_ids)
        tail = n >= 4 and plan.start - runner.whole.start >= n - n % 4
        return row * np.float32(1 + 1e-6) if tail and name == "blk.1.ffn_up" else row

    broken = failed(check(last_columns))
    assert {"prefix", "split"} <= relations(broken)
    prefix = [c for c in broken if c.name == "prefix"]
    assert [c.case for c in prefix] == ["5 of 32 tokens"]
    assert prefix[0].where is not None
    assert prefix[0].where.startswith("blk.1.ffn_up, token 4")
    assert 0 < prefix[0].n_different < prefix[0].n_compared
    assert prefix[0].worst == pytest.approx(0.0, abs=1e-5)


def test_per_batch_scale_breaks_prefix():
    def per_batch(runner, name, row, plan):
        return row * np.float32(1 + 1e-6 * len(runner.whole.token_ids)) if name == "blk.2.attn_norm" else row

    broken = failed(check(per_batch))
    assert "prefix" in relations(broken)
    assert next(c for c in broken if c.name == "prefix").where.startswith("blk.2.attn_norm")


def test_a_position_lost_in_a_continued_batch_breaks_split():
    def restart(runner, name, row, plan):
        continued = runner.whole.start > 0 and len(runner.whole.token_ids) > 1
        return row * np.float32(1.001) if continued and name == "blk.1.k_rope" else row

    broken = failed(check(restart))
    assert relations(broken) == {"split"}
    assert all(c.where.startswith("blk.1.k_rope") for c in broken if c.expectation == "bits")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_stale_slot_in_decode_breaks_one_by_one(layer):
    def stale(runner, name, row, plan):
        if name != f"blk.{layer}.k_rope":
            return row
        before, runner.before = getattr(runner, "before", row), row
        return before if runner.whole.kind == "decode" else row

    broken = failed(check(stale))
    assert "one_by_one" in relations(broken)
    by_bits = [c for c in broken if c.name == "one_by_one" and c.expectation == "bits"]
    assert bool(by_bits) == (layer == 0)
    assert all(c.where.startswith("blk.0.k_rope") for c in by_bits)


def test_one_ulp_in_layer_0_of_decode_is_seen_and_deeper_it_is_within_the_floor():
    def ulp(layer):
        def fault(runner, name, row, plan):
            single = runner.whole.kind == "decode" and name == f"blk.{layer}.q"
            return np.nextafter(row, np.float32(np.inf)) if single else row

        return fault

    assert failed(check(ulp(0)))[0].where.startswith("blk.0.q")
    assert check(ulp(1)).verdict == "holds"


@pytest.mark.parametrize(("option", "value"), [("n_threads", 3), ("kernel", "b")])
def test_bits_that_depend_on_threads_or_kernel_are_seen_and_located(option, value):
    def dependent(runner, name, row, plan):
        if runner.options.get(option) == value and name == "blk.2.ffn_gate" and plan.start == 3:
            row = row.copy()
            row[0, -1] = np.nextafter(row[0, -1], np.float32(np.inf))
        return row

    broken = failed(check(dependent))
    assert [c.case for c in broken] == ["3 threads" if option == "n_threads" else "b"]
    assert broken[0].where == "blk.2.ffn_gate, token 3, pass 0"
    # Recorded in a second run, of the layer that differs: the element, with that option and as usual.
    element = broken[0].element
    assert (element.position, element.index) == (3, (MODEL.hidden_dim - 1,))
    ours, usual = map(np.float32, element.values)
    assert ours == np.nextafter(usual, np.float32(np.inf))


def _one_bit(name: str, position: int | None = None) -> Callable[..., dict[str, TapArray]]:
    """Change one bit of what an engine with three threads hands out; nothing after it changes."""

    def change(runner, taken, select):
        if runner.options.get("n_threads") == 3 and name in taken and position in (None, runner.whole.start):
            array = taken[name].array.copy()
            array.reshape(-1).view(np.uint32)[0] ^= 1
            taken[name] = replace(taken[name], array=array)
        return taken

    return change


@pytest.mark.parametrize("name", taps.of_model(MODEL.n_layers))
def test_one_bit_of_any_tap_of_any_layer_is_seen_and_located(name):
    kind = type("Kind", (Tampered,), {"tamper": staticmethod(_one_bit(name, 0))})
    usual, other = RowRunner(), kind(n_threads=3)
    book = Notebook("candidate", usual.identity.numerics, 3, Names.of(usual, 3, IDS[0]), Form())
    chunks = (tuple(IDS[:2]), tuple(IDS[2:3]))
    case = PlannedCheck("threads", "3 threads", "bits", (2, 1), (2, 1))
    book.compare(case, *(Recorded.make(runner, chunks, book.names) for runner in (other, usual)))
    (broken,) = book.checks
    assert (broken.status, broken.n_different) == ("failed", 1)
    last = name == "result_output"  # of the last token only
    assert broken.where == f"{name}, token {int(last)}, pass 0"
    assert broken.element is not None


def test_a_bit_that_changes_in_decoding_only_is_seen_with_its_pass():
    result = tampered(
        _one_bit("blk.2.ffn_norm", 3), MetamorphicOptions(lengths=(2,), thread_counts=(3,), n_decode=3)
    )
    (broken,) = failed(result)
    assert broken.where == "blk.2.ffn_norm, token 3, pass 2"


def test_what_an_earlier_pass_computes_comes_first():
    def both(runner, taken, select):
        later = _one_bit("blk.0.q", 2)(runner, taken, select)
        return _one_bit("blk.2.ffn_up", 0)(runner, later, select)

    (broken,) = failed(tampered(both, MetamorphicOptions(lengths=(2,), thread_counts=(3,), n_decode=1)))
    assert broken.where == "blk.2.ffn_up, token 0, pass 0"
    assert broken.n_different == 2


def test_a_difference_that_does_not_come_again_is_a_failure_and_said():
    def once(runner, taken, select):
        if runner.options.get("n_threads") == 3 and "blk.1.ffn_act" in taken and not hasattr(runner, "done"):
            runner.done = True
            return _one_bit("blk.1.ffn_act")(runner, taken, select)
        return taken

    (broken,) = failed(tampered(once, MetamorphicOptions(lengths=(2,), thread_counts=(3,), n_decode=1)))
    assert (broken.where, broken.n_different) == ("blk.1.ffn_act, token 0, pass 0", 1)
    assert "not deterministic" in broken.note
    assert broken.element is None


def test_taps_are_recorded_in_as_many_runs_as_memory_asks_for(monkeypatch):
    options = MetamorphicOptions(lengths=(2,), thread_counts=(3,), n_decode=1)
    at_once = tampered(_one_bit("blk.2.ffn_gate"), options)
    runs = []
    monkeypatch.setattr("crossval.capture.MAX_BYTES", 3000)

    def counted(runner, taken, select):
        if runner.whole.start == 0:
            runs.append(sum(tap.array.nbytes for tap in taken.values()))
        return _one_bit("blk.2.ffn_gate")(runner, taken, select)

    result = tampered(counted, options)
    assert result.checks == at_once.checks
    assert failed(result)[0].where == "blk.2.ffn_gate, token 0, pass 0"
    logits = 4 * MODEL.vocab_size  # in every run, to see whether one gives what another gave
    largest = 4 * MODEL.n_heads * 32**2  # scores of the longest prompt: one tap that does not fit
    assert max(runs) <= max(3000, largest) + logits
    assert len(runs) > 3 * len(at_once.checks)


def test_an_engine_whose_runs_differ_is_never_held_to_agree(monkeypatch):
    monkeypatch.setattr("crossval.capture.MAX_BYTES", 3000)

    def drifting(runner, taken, select):
        runner.count = getattr(runner, "count", 0) + 1
        if "result_output" in taken:
            logits = taken["result_output"].array + np.float32(runner.count)
            taken["result_output"] = replace(taken["result_output"], array=logits)
        return taken

    result = tampered(drifting, MetamorphicOptions(lengths=(5,), thread_counts=()))
    assert result.verdict != "holds"
    assert all("result_output" in c.missing for c in result.checks if c.name in ("reset", "capture"))
    assert any("not deterministic, or recording changes it" in (c.note or "") for c in result.checks)


def test_a_tap_that_some_passes_lack_is_missing():
    def sometimes(runner, taken, select):
        return {n: a for n, a in taken.items() if n != "blk.1.attn_sub_norm" or runner.whole.kind == "prefill"}

    result = tampered(sometimes)
    assert result.verdict == "incomplete"
    assert {c.name for c in result.checks if "blk.1.attn_sub_norm" in c.missing} == {"split", "reset", "threads"}


def test_an_element_is_shown_of_checks_that_fail_only():
    def ulp(runner, name, row, plan):
        if runner.whole.kind == "decode" and name == "blk.0.kq":
            row = row.copy()
            row[1, 0, 0] = np.nextafter(row[1, 0, 0], np.float32(np.inf))
        return row

    result = check(ulp)
    assert {c.status for c in result.checks if c.element is not None} == {"failed"}
    first = failed(result)[0]
    assert first.where == "blk.0.kq, token 1, passes 0 and 1"
    assert first.element.index == (1, 0)
    at_once, single = map(np.float32, first.element.values)
    assert single == np.nextafter(at_once, np.float32(np.inf))


def test_an_option_that_the_engine_ignores_is_unchecked():
    def ignoring(**asked: Any) -> RowRunner:
        return RowRunner()

    result = run_metamorphic(ignoring, IDS, n_layers=3, options=MetamorphicOptions(lengths=LENGTHS))
    assert result.verdict == "incomplete"
    assert {(c.name, c.status) for c in result.checks if c.status != "ok"} == {("threads", "unchecked")}
    assert "n_threads = None" in result.checks[-1].note


def test_a_kernel_that_cannot_run_is_unchecked_and_said():
    def opened(**asked: Any) -> RowRunner:
        if asked.get("kernel") == "b":
            raise UnavailableError("this CPU lacks b")
        return RowRunner(**asked)

    options = MetamorphicOptions(lengths=(2,), thread_counts=(), kernels=("a", "b"))
    result = run_metamorphic(opened, IDS, n_layers=3, options=options)
    assert result.verdict == "incomplete"
    assert [(c.case, c.note) for c in result.checks if c.status != "ok"] == [
        ("b", "cannot be run: this CPU lacks b")
    ]


def test_a_crash_is_not_swallowed():
    def opened(**asked: Any) -> RowRunner:
        if asked:
            raise EngineCrashError("killed")
        return RowRunner()

    with pytest.raises(EngineCrashError, match="killed"):
        run_metamorphic(opened, IDS, n_layers=3, options=MetamorphicOptions(lengths=LENGTHS))


class Tampered(RowRunner):
    """An engine that is right inside and hands out something else."""

    tamper: Callable[[Tampered, PassRecord, Collection[str]], PassRecord]

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = super().eval(token_ids, select)
        return replace(record, taps=type(self).tamper(self, dict(record.taps), select))


def tampered(
    tamper: Callable[..., dict[str, TapArray]], options: MetamorphicOptions | None = None
) -> MetamorphicResult:
    kind = type("Kind", (Tampered,), {"tamper": staticmethod(tamper)})
    options = options or MetamorphicOptions(lengths=LENGTHS, thread_counts=(3,))
    return run_metamorphic(lambda **asked: kind(**asked), IDS, n_layers=3, options=options)


def test_capture_that_changes_the_logits_is_seen():
    def observer(runner, taken, select):
        if len(select) > 1:
            logits = taken["result_output"]
            taken["result_output"] = TapArray(np.nextafter(logits.array, np.float32(np.inf)), logits.rows)
        return taken

    assert relations(failed(tampered(observer))) == {"capture"}


class Leaky(RowRunner):
    """A reset that leaves the first cell of the sequence before."""

    own: np.ndarray | None = None
    left: np.ndarray | None = None

    def reset(self) -> None:
        self.left = self.own
        super().reset()

    def _forward(self, plan: PassPlan) -> dict[str, np.ndarray]:
        whole = super()._forward(plan)
        if plan.start == 0:
            cells = self._cache["blk.1.k"]
            self.own = cells[0]
            cells[0] = cells[0] if self.left is None else self.left
        return whole


def test_a_reset_that_leaves_something_behind_is_seen():
    options = MetamorphicOptions(lengths=(5,), thread_counts=())
    result = run_metamorphic(lambda **asked: Leaky(), IDS, n_layers=3, options=options)
    broken = {c.name: c for c in failed(result)}
    assert broken["reset"].where.startswith("blk.1.kq, token 5")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_equal_bits_that_are_not_numbers_are_a_failure(value):
    def poison(runner, taken, select):
        if "blk.1.l_out" in taken:
            array = taken["blk.1.l_out"].array.copy()
            array[0, 0] = value
            taken["blk.1.l_out"] = replace(taken["blk.1.l_out"], array=array)
        return taken

    result = tampered(poison)
    assert result.verdict == "violated"
    assert {"reset", "threads", "prefix", "one_by_one"} <= relations(failed(result))
    assert any("NaN" in (c.note or "") for c in failed(result))
    (reset,) = [c for c in failed(result) if c.name == "reset"]
    assert (reset.where, reset.element.index) == ("blk.1.l_out, token 0, pass 0", (0,))
    assert not np.isfinite(reset.element.values).any()


@pytest.mark.parametrize("tap", ["blk.1.l_out", "blk.0.kqv_out", "blk.0.kq_soft_max", "result_output", "inp_embd"])
def test_a_missing_tap_is_incomplete_never_held(tap):
    result = tampered(lambda runner, taken, select: {n: a for n, a in taken.items() if n != tap})
    assert result.verdict == "incomplete"
    assert any(tap in c.missing for c in result.checks)
    assert not failed(result)


@pytest.mark.parametrize("tap", ["blk.1.l_out", "blk.0.kqv_out", "blk.0.v", "result_output"])
def test_a_tap_of_the_wrong_shape_is_never_held(tap):
    def reshape(runner, taken, select):
        if tap in taken:
            taken[tap] = replace(
                taken[tap], array=taken[tap].array[..., :-1].copy() if runner.whole.start else taken[tap].array[:0]
            )
        return taken

    assert tampered(reshape).verdict in ("violated", "incomplete")


def test_taps_that_never_come_are_not_compared_with_each_other():
    result = tampered(lambda runner, taken, select: {})
    assert result.verdict == "incomplete"
    assert {c.status for c in result.checks} == {"unchecked"}


def test_rounding_of_attention_weights_is_allowed_and_little_more(five_layers):
    """The derived bound of layer 0's KQV: the engine's own difference fits, 2^-9 more does not."""
    ids = enough_tokens([], 1000, 32)
    options = MetamorphicOptions(lengths=(2, 7), thread_counts=(), n_decode=1)

    def run(factor: float) -> MetamorphicResult:
        class Scaled(BitnetPyRunner):
            def eval(self, token_ids, select):
                record = super().eval(token_ids, select)
                if record.plan.kind != "decode" or "blk.0.kqv_out" not in record.taps:
                    return record
                array = record.taps["blk.0.kqv_out"].array * np.float32(factor)
                return replace(record, taps={**record.taps, "blk.0.kqv_out": TapArray(array)})

        return run_metamorphic(lambda **asked: Scaled(five_layers, **asked), ids, n_layers=5, options=options)

    healthy = [c for c in run(1.0).checks if c.case.endswith("kqv_out")]
    assert all(c.status == "ok" and c.n_different > 0 and 0.1 < c.worst <= 1.0 for c in healthy)
    broken = failed(run(1 + 2.0**-9))
    assert {c.case.split(", ")[-1] for c in broken} == {"layer 0 kqv_out"}
    assert all(c.worst > 1.0 and c.where.startswith("blk.0.kqv_out, token") for c in broken)
    for one, other in (c.element.values for c in broken):
        assert other == pytest.approx(one * (1 + 2.0**-9), rel=2.0**-8)
    assert all(c.element is None for c in healthy)


def test_the_engine_holds_on_the_five_layers_with_every_kernel(five_layers):
    result = run_metamorphic(
        lambda **asked: BitnetPyRunner(five_layers, **asked),
        enough_tokens([], 1000, 64),
        n_layers=5,
        options=MetamorphicOptions(kernels=FAMILIES),
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]
    assert [c.case for c in result.checks if c.name == "kernels"] == list(FAMILIES)
    assert {c.case for c in result.checks if c.name == "threads"} == {"1 thread", "2 threads", "3 threads"}
    assert len([c for c in result.checks if c.name == "prefix"]) == 7
    assert len(FAMILIES) > 1


def test_a_model_with_one_head_holds(make_model):
    path = make_model(n_heads=1, n_kv_heads=1)
    result = run_metamorphic(
        lambda **asked: BitnetPyRunner(path, **asked), enough_tokens([], 300, 32), n_layers=2,
        options=MetamorphicOptions(lengths=(1, 2, 9), thread_counts=()),
    )  # fmt: skip
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (IDS, MetamorphicOptions(lengths=())),
        (IDS, MetamorphicOptions(lengths=(0, 3))),
        (IDS, MetamorphicOptions(lengths=(3,), n_decode=0)),
        (IDS[:31], MetamorphicOptions(lengths=(7,), n_decode=2)),
        ((), MetamorphicOptions(lengths=(1,))),
    ],
)
def test_nothing_to_check_is_an_error(ids, options):
    with pytest.raises(BadInputError, match="metamorphic checks need"):
        run_metamorphic(lambda **asked: RowRunner(**asked), ids, n_layers=3, options=options)


def test_a_trace_cannot_be_checked(tmp_path):
    record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=IDS[:4], prompt_text="p", n_decode=1)
    with pytest.raises(BadInputError, match="recorded trace"):
        run_metamorphic(
            lambda **asked: RecordedRunner(tmp_path / "t"),
            IDS,
            n_layers=3,
            options=MetamorphicOptions(lengths=(2,)),
        )


def test_enough_tokens_continues_and_stays_in_the_vocabulary():
    more = enough_tokens([5, 6], 40, 35)
    assert more[:2] == (5, 6)
    assert len(more) == 35
    assert max(more) < 40
    assert more == enough_tokens([5, 6], 40, 35)
    assert enough_tokens([5, 6, 7], 40, 2) == (5, 6, 7)


# --- the pure functions ---------------------------------------------------------------------------------------

OK = MetamorphicCheck("reset", "x", "candidate", "bits", "ok", n_compared=10, n_different=0)
FLOOR = replace(OK, name="one_by_one", expectation="floor", n_different=5, worst=0.5)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"n_different": 1}, "failed"),
        ({"n_compared": 0}, "unchecked"),
        ({"n_compared": -1}, "unchecked"),
        ({"missing": ("q",)}, "unchecked"),
        ({"missing": ("q",), "n_different": 1}, "failed"),
        ({"n_invalid": 1}, "failed"),
        ({"n_invalid": 1, "n_compared": 0}, "failed"),
    ],
)
def test_status_of_a_bits_check_follows_from_its_numbers(changes, status):
    for claimed in ("ok", "failed", "unchecked"):
        assert check_status(replace(OK, **changes, status=claimed)) == status


@pytest.mark.parametrize(
    ("worst", "status"),
    [(0.0, "ok"), (1.0, "ok"), (1.0000001, "failed"), (None, "failed"), (np.nan, "failed"), (np.inf, "failed")],
)
def test_status_of_a_floor_check_follows_from_its_worst(worst, status):
    assert check_status(replace(FLOOR, worst=worst, status="ok")) == status


def test_no_check_is_never_a_pass():
    assert decide((), 0) == "incomplete"
    assert decide((OK,), 0) == "incomplete"
    assert decide((), 1) == "incomplete"


def test_verdict_needs_every_check_once():
    assert decide((OK, FLOOR), 2) == "holds"
    assert decide((OK,), 2) == "incomplete"
    assert decide((OK, OK), 2) == "incomplete"
    assert decide((OK, replace(FLOOR, n_compared=0)), 2) == "incomplete"
    assert decide((OK, replace(FLOOR, worst=2.0)), 2) == "violated"
    assert decide((replace(OK, n_different=3),), 5) == "violated"
