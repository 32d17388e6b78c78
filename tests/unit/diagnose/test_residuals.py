"""Mistakes computed together are as far from the recorded tensor as each of them computed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossval.audit.bounds import Arithmetic
from crossval.diagnose import residuals as module
from crossval.diagnose.hypotheses import Hypothesis, hypotheses
from crossval.diagnose.replay import Mistake, Replay
from crossval.diagnose.residuals import Trial, residuals
from crossval.diagnose.segment import _modes
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from tests.support.faulty_engine import FaultyRunner

ARITHMETIC = Arithmetic(FaultyRunner.identity.numerics, n_heads=4)
PROBE = (0, 3, 4)
EVERY = 41
"""Of the layer's 2,600 mistakes these many are left out after each that is computed: a prime, so that the sample
has mistakes in every operation and in most groups of them."""


@pytest.fixture(scope="module")
def weights(shipped_model: Path) -> SpecWeights:
    return SpecWeights(shipped_model)


def replay(weights: SpecWeights, model: Path, tap: str, *passes: list[int], start: str = "inp_embd") -> Replay:
    engine = FaultyRunner(model, "SiLU", {0})
    records = [engine.eval(ids, [start, tap]) for ids in passes]
    return Replay(op_table(weights.config), weights.config, weights, records, tap, ARITHMETIC)


def alone(one: Replay, trial: Trial) -> list[float] | None:
    """The distances by the definition: the mistake is made, the rest of the segment follows it."""
    quick = _modes(one.segment, ARITHMETIC)[1]
    with np.errstate(all="ignore"):
        end = one.run(trial.mistake, quick, trial.probe)
        return None if end is None else one.distance(end).tolist()


def together(one: Replay, tried: list[Trial]) -> list[list[float] | None]:
    found = residuals(one, tried, _modes(one.segment, ARITHMETIC)[1])
    return [None if distances is None else distances.tolist() for distances in found]


def mistakes(one: Replay) -> list[Hypothesis]:
    return list(hypotheses(one, _modes(one.segment, ARITHMETIC)[1], False))


@pytest.mark.parametrize("passes", [[[1019, 5, 77, 300, 4]], [[1019, 5], [77, 300, 4, 9, 12]]])
def test_together_as_alone(weights: SpecWeights, shipped_model: Path, passes: list[list[int]]) -> None:
    """Bit for bit: with all tokens and with some, in one pass and after another."""
    one = replay(weights, shipped_model, "blk.0.l_out", *passes)
    tried = [
        Trial(mistake.mistake, PROBE if len(mistake.mistake.at) == 1 and number % 2 else None)
        for number, mistake in enumerate(mistakes(one)[::EVERY])
    ]
    assert {len(trial.mistake.at) > 1 for trial in tried} == {True, False}
    assert together(one, tried) == [alone(one, trial) for trial in tried]


def test_only_the_last_token_goes_on_to_the_head(weights: SpecWeights, shipped_model: Path) -> None:
    start = f"blk.{weights.config.n_layers - 1}.ffn_inp"
    one = replay(weights, shipped_model, "result_output", [1019, 5, 77], start=start)
    tried = [Trial(mistake.mistake, None) for mistake in mistakes(one)[::EVERY]]
    found = together(one, tried)
    assert found == [alone(one, trial) for trial in tried]
    assert {len(distances) for distances in found if distances} == {1}


def test_what_has_changed_the_same_is_computed_once(
    weights: SpecWeights, shipped_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replay(weights, shipped_model, "blk.0.l_out", [1019, 5, 77])
    (silu,) = (m.mistake for m in mistakes(one) if m.seen_at == ("ffn_act", "SiLU") and len(m.mistake.at) == 1)
    stacks: list[int] = []
    stacked = module._Trials._stacked

    def counted(self: module._Trials, stop: int, begun: list[object]) -> object:
        stacks.append(len(begun))
        return stacked(self, stop, begun)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Trials, "_stacked", counted)
    monkeypatch.setattr(module, "N_ROWS", 1)  # none waits for another
    found = together(one, [Trial(silu, None)] * 3)
    assert (stacks, found) == ([1], [alone(one, Trial(silu, None))] * 3)


def test_the_same_mistake_seen_on_other_tokens_is_another(weights: SpecWeights, shipped_model: Path) -> None:
    one = replay(weights, shipped_model, "blk.0.l_out", [1019, 5, 77, 300, 4])
    unrotated = next(m.mistake for m in mistakes(one) if m.seen_at == ("q_rope", "not rotated"))
    tried = [Trial(unrotated, None), Trial(unrotated, PROBE), Trial(unrotated, None)]
    found = together(one, tried)
    assert found == [alone(one, trial) for trial in tried]
    assert [len(distances or ()) for distances in found] == [5, len(PROBE), 5]


def test_a_mistake_that_cannot_be_made_has_no_distance(weights: SpecWeights, shipped_model: Path) -> None:
    """There is no decoded pass in which it could be."""
    one = replay(weights, shipped_model, "blk.0.l_out", [1019, 5, 77])
    silu = next(m.mistake for m in mistakes(one) if m.seen_at == ("ffn_act", "SiLU"))
    assert together(one, [Trial(Mistake(silu.at, "decode"), None), Trial(silu, None)])[0] is None


def test_the_end_itself_may_be_wrong(weights: SpecWeights, shipped_model: Path) -> None:
    one = replay(weights, shipped_model, "blk.0.l_out", [1019, 5, 77])
    wrong = [Trial(m.mistake, (0, 2)) for m in mistakes(one) if set(m.mistake.at) == {"blk.0.l_out"}][:4]
    found = together(one, wrong)
    assert found == [alone(one, trial) for trial in wrong]
    assert {len(distances) for distances in found if distances} == {3}
