"""A fault put into one layer must make recovery fall at that layer and nowhere else, whoever has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from crossval.causal.view import CausalView, LayerEffect, causal_view, is_reliable, largest, nothing_recovered_from
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.op import KVState, forward
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord, TapArray
from tests.support.changed_op import changed

N_LAYERS = 5
IDS = tuple(int(i) for i in np.random.default_rng(3).integers(0, 1000, 12))
OUTLINE = taps.of_model(N_LAYERS, outline=True)


@pytest.fixture(scope="module")
def weights(five_layers) -> SpecWeights:
    return SpecWeights(five_layers)


@pytest.fixture(scope="module")
def engine(five_layers) -> PassRecord:
    with BitnetPyRunner(five_layers, n_threads=1) as runner:
        return runner.eval(IDS, OUTLINE)


def broken(
    weights: SpecWeights, tap: str, change: Callable[[np.ndarray], np.ndarray], chunks=(IDS,)
) -> list[PassRecord]:
    """Run the specification with one op's output changed, and record its outline."""
    table = [changed(op, change) if op.output == tap else op for op in op_table(weights.config)]
    state, records, start = KVState(), [], 0
    for chunk in chunks:
        taken = {}
        for op, output in forward(table, weights, chunk, state):
            if op.output in OUTLINE:
                rows = (len(chunk) - 1,) if op.last_row_only else None
                taken[op.output] = TapArray(output.astype(np.float32), rows)
        records.append(PassRecord(PassPlan("prefill", tuple(chunk), start), taken))
        start += len(chunk)
    return records


def negate_half(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[..., : x.shape[-1] // 2] *= -1
    return x


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("who", ["candidate", "reference"])
def test_recovery_falls_at_the_layer_with_the_fault(weights, engine, layer, who):
    bad = broken(weights, f"blk.{layer}.ffn_norm", negate_half)
    pair = (bad, [engine]) if who == "candidate" else ([engine], bad)
    view = causal_view(*pair, weights)
    assert view.reliable
    assert view.largest == view.nothing_recovered_from == f"blk.{layer}.l_out"
    assert [e.tap for e in view.effects] == ["inp_embd", *(f"blk.{i}.l_out" for i in range(N_LAYERS))]
    for effect in view.effects:
        after = effect.layer is not None and effect.layer >= layer
        assert effect.recovered == pytest.approx(0.0 if after else 1.0, abs=0.1)
        guilty, other = (
            (effect.candidate_own_kl, effect.reference_own_kl)
            if who == "candidate"
            else (effect.reference_own_kl, effect.candidate_own_kl)
        )
        # Before the fault the guilty engine does not do what the specification does with its own state.
        assert guilty < view.baseline_kl / 100 if after else guilty > view.baseline_kl / 2
        assert other < view.baseline_kl / 10
    assert sum(e.introduced for e in view.effects) == pytest.approx(1 - view.effects[-1].recovered)


def test_a_wrong_embedding_is_blamed_on_the_embedding(weights, engine):
    view = causal_view(broken(weights, "inp_embd", negate_half), [engine], weights)
    assert view.reliable
    assert view.largest == view.nothing_recovered_from == "inp_embd"


def test_a_fault_after_the_last_layer_is_recovered_everywhere(weights, engine):
    view = causal_view(broken(weights, "result_norm", negate_half), [engine], weights)
    assert view.reliable
    assert view.nothing_recovered_from is None
    assert all(e.recovered > 0.9 for e in view.effects)
    assert view.effects[-1].candidate_own_kl > view.baseline_kl / 2 > view.effects[-1].reference_own_kl


def test_equal_engines_have_nothing_to_recover(weights, engine):
    view = causal_view([engine], [engine], weights)
    assert (view.baseline_kl, view.reliable, view.largest, view.nothing_recovered_from) == (0.0, False, None, None)
    assert all(e.equal_states and e.kl == 0.0 and e.recovered is None for e in view.effects)


def test_rounding_noise_blames_no_layer(five_layers, weights, engine):
    """Token by token and at once differ by flipped codes alone: reported, and marked as noise."""
    with BitnetPyRunner(five_layers, n_threads=1) as runner:
        single = [runner.eval((token,), OUTLINE) for token in IDS]
    view = causal_view(single, [engine], weights)
    assert view.baseline_kl > 0.0
    assert view.noise_kl > 0.0
    assert not view.reliable


def test_passes_are_put_together_and_the_last_layer_needs_one_row(weights, engine):
    bad = broken(weights, "blk.3.ffn_norm", negate_half, chunks=(IDS[:5], IDS[5:11], IDS[11:]))
    for record in bad[:-1]:
        del record.taps[f"blk.{N_LAYERS - 1}.l_out"]
    assert causal_view(bad, [engine], weights).largest == "blk.3.l_out"


def test_patching_is_what_the_specification_does_by_itself(weights):
    """Continuing the specification's own states gives its own logits, from every layer."""
    own = broken(weights, "none", negate_half)
    view = causal_view(own, broken(weights, "blk.0.ffn_norm", negate_half), weights)
    assert all(e.candidate_own_kl < view.baseline_kl / 100 for e in view.effects)


def test_states_that_one_engine_did_not_give_are_said(weights, engine):
    bad = broken(weights, "blk.2.ffn_norm", negate_half)
    coarse = replace(engine, taps={n: t for n, t in engine.taps.items() if n not in ("blk.1.l_out", "inp_embd")})
    view = causal_view(bad, [coarse], weights)
    assert view.not_patched == ("blk.1.l_out",)
    assert view.largest == "blk.2.l_out"


def test_a_recorded_trace_will_do(shipped_model):
    trace = RecordedRunner(shipped_model.with_suffix(".goldens") / "what-is-2-2")
    assert trace.plan is not None
    ids = trace.plan[0].token_ids
    weights = SpecWeights(shipped_model)
    outline = taps.of_model(weights.config.n_layers, outline=True)
    view = causal_view(
        broken(weights, "blk.1.attn_sub_norm", negate_half, chunks=(ids,)), [trace.eval(ids, outline)], weights
    )
    assert view.largest == "blk.1.l_out"


def poisoned(record: PassRecord, tap: str, array: np.ndarray | None) -> PassRecord:
    taken = dict(record.taps)
    if array is None:
        del taken[tap]
    else:
        taken[tap] = TapArray(array, taken[tap].rows)
    return replace(record, taps=taken)


def nan_in(record: PassRecord, tap: str) -> np.ndarray:
    array = record.taps[tap].array.copy()
    array[0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: poisoned(r, "blk.1.l_out", nan_in(r, "blk.1.l_out")), r"candidate: blk\.1\.l_out holds NaN"),
        (lambda r: poisoned(r, "result_output", nan_in(r, "result_output")), "candidate: result_output holds NaN"),
        (lambda r: poisoned(r, "result_output", None), "candidate: no logits"),
        (lambda r: poisoned(r, "result_output", np.ones((1, 7), np.float32)), "expected logits of 1024 tokens"),
        (lambda r: poisoned(r, "blk.1.l_out", np.ones((12, 7), np.float32)), "expected rows of 384"),
        (lambda r: poisoned(r, "blk.1.l_out", np.ones((3, 384), np.float32)), "does not fit 12 tokens"),
        (lambda r: replace(r, taps={"result_output": r.taps["result_output"]}), "nothing can be patched"),
        (lambda r: replace(r, plan=PassPlan("prefill", (*IDS[:-1], 1), 0)), "the same tokens"),
        (lambda r: replace(r, plan=PassPlan("prefill", IDS, 3)), "starts at position 3"),
        (lambda r: None, "at least one token"),
    ],
)
def test_unusable_records_are_a_clear_error(weights, engine, spoil, message):
    spoiled = spoil(engine)
    with pytest.raises(BadInputError, match=message):
        causal_view([spoiled] if spoiled is not None else [], [engine], weights)


# --- the pure functions ---------------------------------------------------------------------------------------


def effects(*recovered: float | None) -> list[LayerEffect]:
    before, made = 1.0, []
    for layer, value in enumerate(recovered):
        introduced = None if value is None else before - value
        made.append(LayerEffect(f"blk.{layer}.l_out", layer, 0.5, value, introduced, 0.2, 0.1, False))
        before = before if value is None else value
    return made


@pytest.mark.parametrize(
    ("recovered", "nothing_from", "most"),
    [
        ((1.0, 0.99, 0.02, -0.01), "blk.2.l_out", "blk.2.l_out"),
        ((0.05, 0.9, 0.0), "blk.2.l_out", "blk.0.l_out"),  # what came back does not count as nothing
        ((1.0, 0.7, 0.4, 0.2), None, "blk.1.l_out"),
        ((0.0, 0.0), "blk.0.l_out", "blk.0.l_out"),
        ((1.0, 1.0), None, None),
        ((None, None), None, None),
        ((), None, None),
    ],
)
def test_what_follows_from_the_effects(recovered, nothing_from, most):
    made = effects(*recovered)
    assert nothing_recovered_from(made) == nothing_from
    assert largest(made) == most


def test_a_disagreement_must_stand_out_from_the_noise():
    made = effects(1.0)  # the better engine's own_kl is 0.1
    assert is_reliable(0.41, 0.01, made)
    assert not is_reliable(0.39, 0.01, made)
    assert not is_reliable(0.41, 0.2, made)
    assert not is_reliable(0.0, 0.0, made)
    assert not is_reliable(9.0, 0.0, [])


def test_kl_is_the_kl_of_the_last_token(weights, engine):
    bad = broken(weights, "blk.4.ffn_norm", negate_half)
    view: CausalView = causal_view(bad, [engine], weights)
    a, b = (r.taps["result_output"].array[-1].astype(np.float64) for r in (bad[0], engine))
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (a, b))
    assert view.baseline_kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
