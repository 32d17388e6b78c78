"""A bug between recorded tensors is identified from the next recorded one, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.capture import Capture
from crossval.diagnose import findings
from crossval.diagnose import residuals as trials
from crossval.diagnose import segment as segment_diagnosis
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis
from crossval.diagnose.replay import HeldWeights, Mistake, Mode, Replay
from crossval.diagnose.residuals import Trial
from crossval.diagnose.segment import diagnose_segment
from crossval.diagnose.variants import candidates
from crossval.engines.recorded import RecordedRunner
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.kinds import FloatArray
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord, TapArray
from tests.support.extra import sampled
from tests.support.faulty_engine import FAULTS, FaultyRunner

ARITHMETIC = Arithmetic(FaultyRunner.identity.numerics, n_heads=4)
SWIGLU = Path(__file__).parents[2] / "data" / "gen2-swiglu"
NAMES = {
    "no attention sub-norm": "norm skipped",
    "no feed-forward sub-norm": "norm skipped",
    "SiLU": "SiLU",
    "gate and up swapped": "activation on up",
    "RoPE base 10000": "RoPE base 10000",
    "no score scale": "no scale",
    "four codes in a row": "codes read four in a row",
    "LayerNorm": "LayerNorm",
    "another norm's weight": "norm weight of blk.{layer}.ffn_norm.weight",
    "mask sees the next": "mask off by one: a token sees the next",
    "128 levels": "128 levels instead of 127",
    "float activations": "no activation quantisation",
    "truncation": "truncation",
    "no attention residual": "residual skipped",
    "no feed-forward residual": "residual skipped",
}
"""The variants' names of the engine's faults."""


@pytest.fixture(scope="module")
def weights(shipped_model: Path) -> SpecWeights:
    return SpecWeights(shipped_model)


ANEW = 97
"""Of the mistakes whose ends are remembered, every so many are computed again and compared."""


@pytest.fixture(scope="module")
def remembered() -> dict[bytes, list[TapArray | None]]:
    return {}


@pytest.fixture(autouse=True)
def ends_once(remembered: dict[bytes, list[TapArray | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the ends of all mistakes once for the same inputs: most engines here differ in nothing but the end.

    Mistakes in the last operation, which see what was recorded, are computed each time.
    """

    def residuals(one: Replay, tried: Sequence[Trial], mode: Mode) -> list[FloatArray | None]:
        inner = [trial for trial in tried if one.tap not in trial.mistake.at]
        last = iter(trials.residuals(one, [trial for trial in tried if one.tap in trial.mistake.at], mode))
        key = _key(one, inner, mode)
        if key in remembered:
            anew = trials.residuals(one, inner[::ANEW], mode)
            for distance, end in zip(anew, remembered[key][::ANEW], strict=True):
                assert (distance is None) == (end is None)
                assert end is None or distance is None or distance.tolist() == one.distance(end).tolist()
        else:
            while len(remembered) > 1:  # 60 MB each
                del remembered[next(iter(remembered))]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one, "distance", lambda end: end)
                remembered[key] = trials.residuals(one, inner, mode)  # type: ignore[assignment]
        ends = iter(remembered[key])
        return [
            next(last) if one.tap in t.mistake.at else None if (e := next(ends)) is None else one.distance(e)
            for t in tried
        ]

    monkeypatch.setattr(segment_diagnosis, "residuals", residuals)


def _key(one: Replay, tried: Sequence[Trial], mode: Mode) -> bytes:
    key = blake2b(repr((one.tap, mode)).encode())
    for record in one.records:
        key.update(repr(record.plan).encode())
        for name, tap in sorted(record.taps.items()):
            if name != one.tap or record is not one.records[-1]:
                key.update(repr((name, tap.rows)).encode() + tap.array.tobytes())
    for trial in tried:
        at = [(op, candidate.name) for op, candidate in trial.mistake.at.items()]
        key.update(repr((at, trial.mistake.kind, trial.probe)).encode())
    return key.digest()


def test_a_fused_swiglu_with_the_wrong_activation_is_named(weights: SpecWeights) -> None:
    """What bitnet.cpp has done since July 2026: one operation for activation and product, SiLU in it."""
    with RecordedRunner(SWIGLU) as runner:
        source = Capture(runner, weights.config, runner.plan)
        (result,) = audit([source], weights)
        found = findings.find("candidate", source, result, weights)
    assert found is not None
    assert (found.check.tap, found.check.n_ops) == ("blk.0.ffn_out", 2)
    data = findings.to_json(found, "crossval ...")
    assert (data["name"], data["op"], data["segment_ops"]) == ("SiLU", "ffn_out", ["blk.0.ffn_act"])
    assert data["explanation"] == (
        "SiLU instead of squared ReLU (ffn_act, inside the segment that ends in ffn_out)"
    )
    assert data["ratio"] < 1e-6
    assert data["specification_ratio"] > 0.5


def tokens(n: int, seed: int) -> list[int]:
    return [1019, *np.random.default_rng(seed).integers(0, 1000, n - 1).tolist()]


def replay(weights: SpecWeights, records: list[PassRecord], tap: str) -> Replay:
    return Replay(op_table(weights.config), weights.config, HeldWeights(weights, ()), records, tap, ARITHMETIC)


def diagnosed(
    weights: SpecWeights, engine: FaultyRunner, tap: str, passes: Sequence[Sequence[int]], guilty: Sequence[int]
) -> Diagnosis:
    """Diagnose the segment that ends in ``tap`` in some passes of an engine that records outlines up to it."""
    outline = taps.of_model(weights.config.n_layers, outline=True)
    outline = outline[: outline.index(tap) + 1]
    records: list[PassRecord] = [engine.eval(ids, outline) for ids in passes]
    return diagnose_segment([replay(weights, records[: i + 1], tap) for i in guilty], ARITHMETIC)


DEEP = ("SiLU", "128 levels")
"""Faults of the third layer, in a longer prompt."""


@pytest.mark.parametrize("fault", sampled(sorted(FAULTS, key=lambda fault: fault in DEEP), 2))
def test_one_layers_output_is_enough_for_the_name(fault: str, weights: SpecWeights, shipped_model: Path) -> None:
    layer, n = (2, 20) if fault in DEEP else (0, 5)
    engine = FaultyRunner(shipped_model, fault, {layer})
    found = diagnosed(weights, engine, f"blk.{layer}.l_out", [tokens(n, 1)], [0])
    if fault == "truncation":  # thousands of values lie a rounding from an integer: most tokens are off by flips
        assert found.name in (UNDETERMINED, NAMES[fault])
        return
    assert found.name == NAMES[fault].format(layer=layer), found.explanation
    assert found.ratio is not None
    assert found.ratio < 2e-6
    assert found.specification_ratio > 1e-3
    assert found.segment_ops[0] == f"blk.{layer}.{FAULTS[fault]}"


def test_one_mistake_has_to_explain_prompt_and_decoded_tokens(weights: SpecWeights, shipped_model: Path) -> None:
    """Keys and values of earlier passes were not recorded either: they are computed with the same mistake."""
    engine = FaultyRunner(shipped_model, "RoPE base 10000")
    found = diagnosed(weights, engine, "blk.0.l_out", [tokens(7, 1), [55], [8]], [0, 1, 2])
    assert (found.name, found.segment_ops) == ("RoPE base 10000", ("blk.0.q_rope", "blk.0.k_rope"))
    assert found.explanation == (
        "base 10000 instead of the header's value (queries and keys, inside the segment that ends in l_out)"
    )


def test_passes_that_contradict_each_other_have_no_name(weights: SpecWeights, shipped_model: Path) -> None:
    outline = taps.of_model(weights.config.n_layers, outline=True)
    broken, other = (FaultyRunner(shipped_model, fault, {0}) for fault in ("SiLU", "no feed-forward sub-norm"))
    first, _ = broken.eval(tokens(7, 1), outline), other.eval(tokens(7, 1), outline)
    records = [first, other.eval([55], outline)]
    replays = [replay(weights, records[:n], "blk.0.l_out") for n in (1, 2)]
    assert diagnose_segment(replays[:1], ARITHMETIC).name == "SiLU"
    assert diagnose_segment(replays, ARITHMETIC).name == UNDETERMINED


def test_a_segment_over_two_layers_has_the_mistake_in_both(weights: SpecWeights, shipped_model: Path) -> None:
    engine = FaultyRunner(shipped_model, "no attention sub-norm")
    record = engine.eval(tokens(3, 3), ["blk.0.kqv_out", "inp_embd", "blk.1.attn_o_out"])
    found = diagnose_segment([replay(weights, [record], "blk.1.attn_o_out")], ARITHMETIC)
    assert (found.name, found.segment_ops) == ("norm skipped", ("blk.0.attn_sub_norm", "blk.1.attn_sub_norm"))
    assert "attn_sub_norm of layers 0 to 1, inside the segment that ends in attn_o_out" in found.explanation


def segment(
    weights: SpecWeights, model: Path, fault: str | None, n: int = 9, change: float = 1.0, row: int = 0
) -> Replay:
    """The first layer of an engine, one token of its output scaled."""
    record = FaultyRunner(model, fault, {0}).eval(tokens(n, 5), ["inp_embd", "blk.0.l_out"])
    record.taps["blk.0.l_out"].array[row] *= np.float32(change)
    return replay(weights, [record], "blk.0.l_out")


def test_a_healthy_engine_has_no_mistake(weights: SpecWeights, shipped_model: Path) -> None:
    healthy = segment(weights, shipped_model, None)
    found = diagnose_segment([healthy], ARITHMETIC)
    assert (found.name, found.candidates, found.segment_ops) == (UNDETERMINED, (), ())
    assert found.specification_ratio < 1e-6


def test_a_token_that_no_flip_explains_forbids_the_name(weights: SpecWeights, shipped_model: Path) -> None:
    """One token is off by a hundredth: an int8 tie could cause that, but it has none."""
    found = segment(weights, shipped_model, "SiLU")
    wide = segment_diagnosis._modes(found.segment, ARITHMETIC)[0][-1]
    silu = next(one for one in candidates(found.context(found.segment[-5], wide)) if one.name == "SiLU")
    assert found.segment[-5].name == "ffn_act"
    ties = found.near_ties(Mistake({"blk.0.ffn_act": silu}), wide)
    row = int(np.flatnonzero(~ties)[0])
    assert diagnose_segment([found], ARITHMETIC).name == "SiLU"
    changed = segment(weights, shipped_model, "SiLU", change=1.01, row=row)
    assert diagnose_segment([changed], ARITHMETIC).name == UNDETERMINED


def test_mistakes_that_give_the_same_output_are_listed(weights: SpecWeights, shipped_model: Path) -> None:
    """Of two tokens the first sees the next, as it would without any mask."""
    found = segment(weights, shipped_model, "mask sees the next", n=2)
    told = diagnose_segment([found], ARITHMETIC)
    assert told.name == UNDETERMINED
    names = [one.name for one in told.candidates]
    assert {"mask missing", NAMES["mask sees the next"]} <= set(names)
    assert "not distinguishable on this input" in told.explanation


def test_too_large_a_search_is_not_begun(
    weights: SpecWeights, shipped_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = segment(weights, shipped_model, "SiLU")
    monkeypatch.setattr(segment_diagnosis, "MOST_WORK", 10**6)
    told = diagnose_segment([found], ARITHMETIC)
    assert (told.name, told.ratio) == (UNDETERMINED, None)
    assert "record every tap of layer 0" in told.explanation
