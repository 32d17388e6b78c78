"""Segments: engines that record few taps are judged by rounding, and flips inside are explained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitnet_py.gguf import GGUFFile
from crossval.audit.bounds import Arithmetic
from crossval.audit.segments import Segment
from crossval.audit.state import Output, PassState
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.model.graphs import op_table
from crossval.passes import Numerics, PassPlan, TapArray
from tests.support import healthy_strangers
from tests.support.wrapped import Wrapped
from tests.unit.audit.test_audit import ALL, PLANS, run

COARSE = ["blk.0.l_out", "blk.1.l_out", "result_output"]


@pytest.mark.parametrize("anonymous", [False, True])
@pytest.mark.parametrize("only", [COARSE, ["result_output"], ["blk.0.kqv_out", "blk.1.ffn_inp", "result_output"]])
def test_coarse_trace_is_audited_in_segments(engine, weights, only, anonymous):
    """An engine with F16 keys is right; over several layers the F16 ties may leave a distance unresolved."""
    result = run(Wrapped(engine, only=only, numerics=Numerics() if anonymous else None), weights)
    assert result.verdict == ("within" if only == ["result_output"] else "clean")
    assert result.n_covered == result.n_ops
    assert [check.tap for check in result.checks] == only * len(PLANS)
    assert all(check.n_ops > 1 for check in result.checks)


@pytest.mark.parametrize("only", [COARSE, ["result_output"], [n for n in ALL if "norm" not in n]])
def test_segments_of_an_engine_without_f16_are_shown_to_the_rounding(make_model, weights, only):
    with SpecRunner(make_model()) as specification:
        result = run(Wrapped(specification, only=only), weights)
    assert result.verdict == "clean"
    assert max(check.ratio for check in result.checks) < 1


def test_a_flip_inside_a_segment_is_explained_exactly(make_model, weights):
    """The other quantiser rounds ties to other sides; what it changes is found again, activation by activation."""
    only, explained = [n for n in ALL if "norm" not in n], 0
    with BitnetPyRunner(make_model(), n_threads=1, numerics=Numerics(8, True)) as runner:
        other = Wrapped(runner, only=only, numerics=Numerics(8, False))
        rng = np.random.default_rng(0)
        for _ in range(4):
            ids = tuple(int(i) for i in rng.integers(0, 300, 200))
            result = run(other, weights, [PassPlan("prefill", ids, 0)])
            assert result.verdict == "clean"
            explained += sum(check.flips for check in result.checks if check.n_ops > 1)
    assert explained > 0


def test_a_flip_that_every_token_reads_is_found_under_the_reading_that_is_right(make_model, weights, monkeypatch):
    """With it no reading fits any token at first, and wider bounds make a wrong one look better."""
    with SpecRunner(make_model()) as engine:  # which keeps keys in binary32
        norms = engine.eval(range(300), ["blk.0.attn_norm"]).taps["blk.0.attn_norm"].array.astype(np.float64)
        scaled = norms * (127 / np.abs(norms).max(axis=1, keepdims=True))
        token, feature = divmod(int(np.argmin(np.abs(np.abs(scaled) % 1 - 0.5))), norms.shape[1])
        plans = [PassPlan("prefill", (token, 5, 9, 20, 33), 0)]
        only = ["inp_embd", "blk.0.kq"]
        stated = Numerics()
        settle, segments = Segment.settle, []
        monkeypatch.setattr(Segment, "settle", lambda segment: segments.append(segment) or settle(segment))
        run(Wrapped(engine, only=only, numerics=stated), weights, plans)
        (segment,) = segments
        flip = {("blk.0.attn_norm", 0): frozenset({feature})}
        flipped = segment.evaluate(segment.every_row, flip, {})[0]["blk.0.kq"].approx.value
        engine.reset()
        at = {(0, "blk.0.kq"): lambda array: flipped}
        result = run(Wrapped(engine, only=only, numerics=stated, at=at), weights, plans)
    assert {check.tap: (check.status, check.flips) for check in result.checks}["blk.0.kq"] == ("ok", 1)


def test_a_bound_that_overflows_shows_nothing(tmp_path):
    """The logits alone of a deep model in bfloat16: 183 operations, after which the bound is infinite."""
    situation = replace(healthy_strangers.Situation.draw(469), pieces=(2,), n_decode=0)
    found = healthy_strangers.judged(situation, healthy_strangers.Bench(tmp_path))
    (check,) = (one for one in found.found.audits["candidate"].checks if one.tap == "result_output")
    assert (check.status, check.within, found.verdict) == ("within", 1.0, "incomplete")


def test_coarse_trace_names_the_layer(make_model, weights):
    path = make_model()
    damaged = path.with_name("damaged.gguf")
    data = bytearray(path.read_bytes())
    with GGUFFile.open(path) as gguf:
        info = gguf.tensors["blk.1.ffn_down.weight"]
        at = info.offset + info.shape[0] * info.shape[1] // 4
    data[at : at + 4] = (np.frombuffer(bytes(data[at : at + 4]), "<f4") * 2).astype("<f4").tobytes()
    damaged.write_bytes(data)
    with BitnetPyRunner(damaged, n_threads=1) as runner:
        coarse = run(Wrapped(runner, only=COARSE), weights)
        fine = run(runner, weights)
    assert coarse.verdict == fine.verdict == "guilty"
    assert coarse.first_guilty.tap == "blk.1.l_out"
    assert fine.first_guilty.tap == "blk.1.ffn_down"


@pytest.mark.parametrize(
    ("stated", "floor"),
    [
        ({}, 0.03),
        ({"compute_dtype": "f16"}, 0.045),
        ({"compute_dtype": "bf16"}, 0.09),
        ({"compute_dtype": "f32", "op_dtypes": (("bitlinear", "f16"),)}, 0.045),
        ({"kv_dtype": "bf16"}, 0.03),
    ],
    ids=str,
)
def test_how_far_flips_may_move_a_token_follows_from_the_format(weights, stated, floor):
    """``blk.0.l_out``: one layer, 2 x 2 for safety and for the worst token."""
    ops = [op for op in op_table(weights.config) if op.layer == 0]
    output = Output(ops[-1], PassState(0, PLANS[0]), TapArray(np.zeros((1, 1), np.float32)))
    segment = Segment(output, tuple(ops), {}, {}, weights, Arithmetic(Numerics(**stated), 4), {})
    assert segment.tolerance == pytest.approx(4 * floor)
    deep = tuple(replace(ops[-1], layer=layer) for layer in range(900))
    far = Segment(output, deep, {}, {}, weights, Arithmetic(Numerics(**stated), 4), {}).tolerance
    assert 0.5 < far < 1, "a row of zeros, or an unrelated one, is not explained by flips"
