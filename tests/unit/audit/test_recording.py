"""Recording errors of correct engines are named and no engine is; wrong engines stay wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.audit.recording import Settled, settle
from crossval.capture import Capture
from crossval.engines.recorded import RecordedRunner
from crossval.engines.spec import SpecRunner
from crossval.model import taps
from crossval.model.op import Op
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan
from crossval.receipts import file as receipt
from tests.support.changed_op import changed
from tests.support.extra import sampled
from tests.support.rewritten import Change, Passes, put, rewritten
from tests.support.strangers import Fault, run

Record = Callable[..., Path]
Judged = Callable[..., tuple[int, receipt.Receipt, str]]
LAYERS = (0, 1)


def after_rope(passes: Passes) -> None:
    for given in passes:
        for layer in LAYERS:
            for name in ("q", "k"):
                given[f"blk.{layer}.{name}"] = given[f"blk.{layer}.{name}_rope"]


def overwritten(passes: Passes) -> None:
    for index in range(len(passes)):
        put(passes, index, "blk.0.l_out", passes[index]["blk.1.attn_norm"].array)


def normed(passes: Passes) -> None:
    for given in passes:  # only the last token's norm is recorded: record the state of that token, too
        given["blk.1.l_out"] = given["result_norm"]


def one_buffer(passes: Passes) -> None:
    """Every copy of the residual stream refers to the same buffer and is read when the pass has ended."""
    for index in (1, 2):
        for name in ("inp_embd", "blk.0.ffn_inp", "blk.0.l_out", "blk.1.ffn_inp"):
            put(passes, index, name, passes[index]["blk.1.l_out"].array)


def scores_after_softmax(passes: Passes) -> None:
    for given in passes:
        for layer in LAYERS:
            given[f"blk.{layer}.kq"] = given[f"blk.{layer}.kq_soft_max"]


def scaled_scores(passes: Passes) -> None:
    for given in passes:
        for layer in LAYERS:
            given[f"blk.{layer}.kq"].array[...] *= np.float32(0.125)


def heads_first(passes: Passes) -> None:
    put(passes, 0, "blk.1.q_rope", passes[0]["blk.1.q_rope"].array.transpose(1, 0, 2))


def turned(passes: Passes) -> None:
    put(passes, 0, "blk.0.ffn_up", passes[0]["blk.0.ffn_up"].array.T)


def stale(passes: Passes) -> None:
    put(passes, 1, "blk.1.ffn_norm", passes[2]["blk.1.ffn_norm"].array)


def never_written(passes: Passes) -> None:
    passes[0]["blk.0.kqv_out"].array[...] = np.nan


@pytest.mark.parametrize(
    ("change", "names", "passes", "words"),
    [
        (after_rope, ["blk.0.q", "blk.1.q"], [0, 1, 2], ("holds blk.0.q_rope to the last bit", "before RoPE")),
        (overwritten, ["blk.0.l_out"], [0, 1, 2], ("holds blk.1.attn_norm to the last bit", "used again for")),
        (normed, ["blk.1.l_out"], [0, 1, 2], ("holds result_norm to the last bit", "before the final norm")),
        (one_buffer, ["inp_embd"], [1, 2], ("holds blk.1.l_out to the last bit", "as soon as")),
        (scores_after_softmax, ["blk.0.kq", "blk.1.kq"], [0, 1, 2], ("kq_soft_max to the last bit", "softmax")),
        (scaled_scores, ["blk.0.kq", "blk.1.kq"], [0, 1, 2], ("holds 0.125 times its values", "scaled")),
        (heads_first, ["blk.1.q_rope"], [0], ("axes in the order head, token, feature", "docs/trace-format.md")),
        (turned, ["blk.0.ffn_up"], [0], ("axes in the order feature, token", "docs/trace-format.md")),
        (stale, ["blk.1.ffn_norm"], [1], ("its own values of pass 2 to the last bit", "in every pass")),
        (never_written, ["blk.0.kqv_out"], [0], ("values are not finite, and nothing read them", "copy")),
    ],
)
def test_a_recording_error_is_named_and_no_engine_is_wrong(
    judged: Judged, tmp_path: Path, change: Change, names: list[str], passes: list[int], words: tuple[str, ...]
) -> None:
    code, made, text = judged(change)
    assert (code, made["verdict"]) == (3, "incomplete"), text
    audit = made["audit"]["candidate"]
    assert (audit["verdict"], audit["first_guilty"], made["diagnosis"]) == ("incomplete", None, [])
    found = audit["misrecorded"][0]
    assert (found["kind"], found["taps"], found["passes"]) == ("tap", names, passes)
    assert "misrecorded" not in made["audit"]["reference"]
    said = f"{found['explanation']}; {found['remedy']}"
    for word in words:
        assert word in said
    assert "recording  candidate: RECORDED INCORRECTLY: " in text
    assert said in text
    assert "Nothing is proven against either engine" in text
    gated = run("gate", tmp_path / "r.json", "--allow-compute", "recorded")
    assert gated.exit_code == 1
    failed = [line.split("  ")[0].strip() for line in gated.stdout.splitlines() if " FAIL " in line]
    assert failed == ["verdict", "audit of the candidate", "two parties"], gated.stdout


def forgotten(array: np.ndarray) -> np.ndarray:
    return np.zeros_like(array)


def moved(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=-1)


@pytest.mark.parametrize(
    ("tap", "change", "index"),
    sampled([(tap, *how) for tap in taps.of_model(2)[:-1] for how in ((forgotten, 0), (moved, 2))], 3),
)
def test_any_tensor_but_the_logits_can_be_a_recording_error(
    model_path: Path,
    record: Record,
    tmp_path: Path,
    tap: str,
    change: Callable[[np.ndarray], np.ndarray],
    index: int,
) -> None:
    def alter(passes: Passes) -> None:
        put(passes, index, tap, change(passes[index][tap].array))

    trace = rewritten(record("other"), tmp_path / "t", alter)
    weights = SpecWeights(model_path)
    with RecordedRunner(trace) as runner:
        source = Capture(runner, weights.config, runner.plan)
        (result,) = audit([source], weights)
        assert result.verdict == "guilty"
        found = settle(source, result, weights).result
    assert [(one.taps, one.passes) for one in found.misrecorded] == [((tap,), (index,))]
    assert (found.verdict, found.first_guilty) == ("incomplete", None)


def test_logits_that_are_wrong_are_the_engines(judged: Judged) -> None:
    """Nothing reads them, so nothing shows that they were recorded incorrectly."""
    code, made, _ = judged(lambda given: put(given, 0, "result_output", moved(given[0]["result_output"].array)))
    assert (code, made["verdict"]) == (1, "candidate_defect")


# Engines that are really wrong


def doubled(x: np.ndarray) -> np.ndarray:
    return 2.0 * x


def rolled(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1, axis=-1)


def halved(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    y[..., x.shape[-1] // 2 :] = 0.0
    return y


class Wrong(SpecRunner):
    """The specification with some of its operations computed wrongly; what reads them reads the wrong values."""

    def __init__(self, path: Path, changes: dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        super().__init__(path)
        self._changes = changes

    def __enter__(self) -> Wrong:
        super().__enter__()
        self._table = tuple(self._changed(op) for op in self._table)
        return self

    def _changed(self, op: Op) -> Op:
        change = self._changes.get(op.output)
        return op if change is None else changed(op, change)


PLANS = [PassPlan("prefill", (1, 17, 42, 250, 3, 99, 8), 0), PassPlan("decode", (11,), 7)]
OPS = [f"blk.0.{name}" for name in taps.of_graph(None) if name in taps.LAYER_TAPS] + [
    "inp_embd",
    "result_norm",
    "blk.1.l_out",
]


PAIRS = [
    ("blk.0.attn_norm", "blk.0.q"),
    ("blk.0.q", "blk.0.q_rope"),
    ("blk.0.kq", "blk.0.kq_soft_max"),
    ("blk.0.ffn_gate", "blk.0.ffn_act"),
    ("blk.0.ffn_down", "blk.0.l_out"),
]


def settled(model: Path, changes: dict[str, Callable[[np.ndarray], np.ndarray]]) -> Settled:
    weights = SpecWeights(model)
    with Wrong(model, changes) as runner:
        source = Capture(runner, weights.config, PLANS)
        (result,) = audit([source], weights)
        assert result.verdict == "guilty"
        return settle(source, result, weights)


@pytest.mark.parametrize(
    ("wrong", "change"),
    sampled(product([*((op,) for op in OPS), *PAIRS], (doubled, rolled, halved)), 4, lambda case: case[:1]),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_an_engine_that_computes_wrong_values_stays_wrong(
    model_path: Path, wrong: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Also where the next operation is wrong, too."""
    found = settled(model_path, dict.fromkeys(wrong, change)).result
    assert (found.misrecorded, found.verdict) == ((), "guilty")
    assert found.first_guilty is not None
    assert found.first_guilty.tap == wrong[0]


def test_a_bug_after_a_recording_error_is_still_found(judged: Judged) -> None:
    code, made, text = judged(after_rope, fault=Fault(rolled_from="1/ffn_sub_norm"))
    assert (code, made["verdict"]) == (1, "candidate_defect"), text
    audit = made["audit"]["candidate"]
    assert audit["first_guilty"]["tap"] == made["diagnosis"][0]["tap"] == "blk.1.ffn_sub_norm"
    assert [one["taps"] for one in audit["misrecorded"]] == [["blk.0.q", "blk.1.q"], ["blk.0.k", "blk.1.k"]]
    assert "RECORDED INCORRECTLY: q of layers 0 and 1, passes 0 and 1; " in text


def test_a_correct_tensor_between_two_recording_errors_is_not_named(
    make_model: Callable[..., Path], judged: Judged
) -> None:
    """Only layer outputs are recorded: those of layers 0 and 2 hold the next one's, what lies between is right."""

    def change(passes: Passes) -> None:
        for given in passes:
            for layer in (0, 2):
                given[f"blk.{layer}.l_out"] = given[f"blk.{layer + 1}.l_out"]

    code, made, text = judged(change, model=make_model(n_layers=5), names=taps.of_model(5, outline=True))
    assert (code, made["verdict"]) == (3, "incomplete"), text
    found = [one["taps"] for one in made["audit"]["candidate"].get("misrecorded", [])]
    assert found == [["blk.0.l_out", "blk.2.l_out"]], text


def test_agreement_within_a_distance_shows_no_recording_error(
    make_model: Callable[..., Path], judged: Judged
) -> None:
    """After a layer output that is no other tensor's come two layers that flips blur: that is not enough."""

    def change(passes: Passes) -> None:
        for given in passes:
            given["blk.0.l_out"].array[...] = moved(given["blk.0.l_out"].array)

    model = make_model(n_layers=4, dim=512, hidden_dim=1024, n_heads=8)
    _, made, text = judged(change, model=model, names=taps.of_model(4, outline=True))
    audit = made["audit"]["candidate"]
    assert audit["first_guilty"]["tap"] == "blk.0.l_out"
    assert ("misrecorded" in audit, made["verdict"]) == (False, "candidate_defect"), text
