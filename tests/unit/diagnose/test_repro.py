"""Reproducers: a script for every kind of operation, which fails on what was recorded and passes when correct."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.diagnose import findings, repro, repro_script
from crossval.diagnose.diagnosis import UNDETERMINED, Diagnosis
from crossval.diagnose.findings import Finding
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.kinds import KINDS, Gelu, Kind, L2Norm, Pool, Scale, SquaredRelu
from crossval.model.taps import token_axis
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, TapArray
from tests.support.extra import sampled
from tests.support.strangers import Fault, Stranger

PLANS = [PassPlan("prefill", (1, 17, 42, 250, 3), 0), PassPlan("decode", (11,), 5)]
TAPS = [name for name in taps.of_model(2) if not name.startswith("blk.0.")]

Change = Callable[[int, str, TapArray], TapArray]


class Altered(Stranger):
    """Its recording is changed in one place; what it computed is correct."""

    change: Change | None = None
    n_done = 0

    def reset(self) -> None:
        super().reset()
        self.n_done = 0

    def eval(self, token_ids: Any, select: Any) -> Any:
        record = super().eval(token_ids, select)
        if self.change is not None:
            for name in record.taps:
                record.taps[name] = self.change(self.n_done, name, record.taps[name])  # type: ignore[index]
        self.n_done += 1
        return record


@pytest.fixture(scope="module", params=[False, True], ids=["known", "anonymous"])
def engine(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Iterator[Altered]:
    Altered.anonymous = request.param
    with Altered(make_model(), n_threads=1) as runner:
        yield runner


@pytest.fixture(scope="module")
def weights(make_model: Callable[..., Path]) -> SpecWeights:
    return SpecWeights(make_model())


def wrong(index: int, tap: str, value: float | None = None) -> Change:
    """Move an element of the pass's last token that every mask shows; ``value`` in its place when given."""

    def change(at: int, name: str, given: TapArray) -> TapArray:
        if (at, name) != (index, tap):
            return given
        array = given.array.copy()
        last = np.take(array, -1, axis=token_axis(tap))
        place = list(np.unravel_index(int(np.abs(last).argmax()), last.shape))
        place.insert(token_axis(tap), array.shape[token_axis(tap)] - 1)
        array[tuple(place)] = array[tuple(place)] * 1.05 + 1e-3 if value is None else value
        return TapArray(array, given.rows)

    return change


def found(engine: Altered, weights: SpecWeights, change: Change | None) -> Finding:
    engine.change = change
    source = Capture(engine, weights.config, PLANS)
    (result,) = audit([source], weights)
    finding = findings.find("candidate", source, result, weights)
    assert finding is not None
    return finding


def judged(script: Path, output: Path | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a script as a process would, in this one."""
    before, sys.argv = sys.argv, [str(script), *([] if output is None else [str(output)])]
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return int(left.value.code or 0), capsys.readouterr().out


def right_output(engine: Altered, finding: Finding, given: Any) -> Any:
    """What the same engine computed, unchanged, cut as the reproducer is."""
    engine.change = None
    engine.reset()
    check = finding.check
    for plan in PLANS[: check.pass_index + 1]:
        tap = engine.eval(plan.token_ids, [check.tap]).taps[check.tap]
    last = np.take(tap.array, [-1], axis=token_axis(check.tap))
    if "features" in given:
        return last.reshape(1, -1)[:, given["features"]]
    return last[..., : given["recorded"].shape[-1]]


NOT_SEARCHED = Diagnosis(UNDETERMINED, None, "no cause was searched for", None, None, None, 1.0)


@pytest.fixture(scope="module")
def found_without_cause(engine: Altered, weights: SpecWeights) -> Callable[[str, int], Finding]:
    """A wrong element of a tap in a pass, as a finding; its cause, which no value shows, is not searched for."""
    made: dict[tuple[str, int], Finding] = {}

    def finding(tap: str, index: int) -> Finding:
        if (tap, index) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(findings, "diagnose_passes", lambda *_, **__: NOT_SEARCHED)
                made[tap, index] = found(engine, weights, wrong(index, tap))
        return made[tap, index]

    return finding


@pytest.mark.parametrize(("tap", "index"), sampled(product(TAPS, (0, 1)), 3, lambda case: case[:1]))
def test_every_operation_has_a_script_that_is_right_and_wrong(
    engine: Altered,
    found_without_cause: Callable[[str, int], Finding],
    tap: str,
    index: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finding = found_without_cause(tap, index)
    assert (finding.check.tap, finding.check.pass_index) == (tap, index)
    script = repro.write(finding, "the engine", tmp_path)
    assert NOT_SEARCHED.explanation in script.read_text()
    code, text = judged(script, None, capsys)
    assert code == 1
    assert text.startswith("wrong: 1 of ")
    times = re.search(r"worst: .*: (\S+), correct is (\S+), (\S+) times the bound\n", text)
    assert times is not None
    worst = finding.check.worst
    assert worst is not None
    assert float(times[1]) == worst.recorded
    if not engine.anonymous:
        assert float(times[2]) == pytest.approx(worst.expected, rel=1e-12)
    if finding.check.ratio is not None and not engine.anonymous:
        assert float(times[3]) == pytest.approx(finding.check.ratio, rel=6e-3)
    given = np.load(tmp_path / repro.INPUTS)
    np.save(tmp_path / "right.npy", right_output(engine, finding, given))
    code, text = judged(script, tmp_path / "right.npy", capsys)
    assert (code, text) == (0, f"correct: all {given['recorded'].size} values are within their bounds\n")


@pytest.mark.parametrize("tap", ["blk.1.v", "blk.1.attn_o_out", "blk.1.q_rope", "blk.1.ffn_act"])
def test_what_only_llama_has_is_in_its_script(
    make_model: Callable[..., Path], tap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Biases, factors of angles, linear scaling, pairs (2i, 2i + 1)."""
    monkeypatch.setattr(Altered, "anonymous", False)
    path = make_model(arch="llama", biases=True, rope_freqs=True, scales=True, rope_scaling=4.0)
    with Altered(path, n_threads=1) as llama:
        finding = found(llama, SpecWeights(path), wrong(0, tap))
        assert finding.check.tap == tap
        script = repro.write(finding, "the engine", tmp_path)
        assert judged(script, None, capsys)[0] == 1
        np.save(tmp_path / "right.npy", right_output(llama, finding, np.load(tmp_path / repro.INPUTS)))
    assert judged(script, tmp_path / "right.npy", capsys)[0] == 0


@pytest.mark.parametrize("tap", ["inp_embd", "result_output"])
@pytest.mark.parametrize("embedding", ["f32", "bf16", "q8_0", "q6_k", "tq2_0"])
def test_tables_of_every_quantiser_have_a_script(
    make_model: Callable[..., Path], embedding: str, tap: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Altered, "anonymous", False)
    path = make_model(dim=256, hidden_dim=256, embedding=embedding)
    with Altered(path, n_threads=1) as runner:
        finding = found(runner, SpecWeights(path), wrong(0, tap))
        assert finding.check.tap == tap
        script = repro.write(finding, "the engine", tmp_path)
        assert judged(script, None, capsys)[0] == 1
        np.save(tmp_path / "right.npy", right_output(runner, finding, np.load(tmp_path / repro.INPUTS)))
    assert judged(script, tmp_path / "right.npy", capsys)[0] == 0


def test_every_kind_has_a_formula() -> None:
    assert set(repro_script._FORMULAS) == KINDS


@pytest.mark.parametrize("kind", [Gelu(), Scale(0.3), Pool("mean"), Pool("last"), Pool("cls"), L2Norm()], ids=repr)
def test_the_formulas_of_embedding_models_are_those_of_the_specification(kind: Kind) -> None:
    random = np.random.default_rng(1)
    names = repro_script.INPUT_NAMES[type(kind)]
    given = {name: random.standard_normal((5, 8)) * 4 for name in names if name != "position"}
    inputs: list[Any] = list(given.values())
    if "position" in names:
        inputs.append(np.array([3]))
    text = repro_script._formula(type(kind), {**vars(kind), "position": 3})
    body = "def formula(given):\n" + "".join(f"    {line}\n" for line in text.strip().splitlines())
    scope: dict[str, Any] = {"np": np}
    exec(body, scope)
    np.testing.assert_allclose(scope["formula"](given), kind.compute(*inputs), rtol=1e-14)


@pytest.mark.parametrize("tap", TAPS)
def test_as_little_as_shows_the_mistake(
    found_without_cause: Callable[[str, int], Finding], weights: SpecWeights, tap: str
) -> None:
    made = repro.build(found_without_cause(tap, 0), "the engine")
    shapes = {name: array.shape for name, array in made.arrays.items()}
    config = weights.config
    one = (1, config.dim)
    expected: dict[str, dict[str, tuple[int, ...]]] = {
        "inp_embd": {"table_row": one},
        "kq": {"q": (1, 2, 64), "k": (5, 1, 64)},
        "kq_soft_max": {"scores": (2, 1, 5)},
        "kqv_out": {"weights": (2, 1, 5), "v": (5, 1, 64)},
        "q": {"x": one, "signs": (repro.MAX_FEATURES, 128), "features": (repro.MAX_FEATURES,)},
        "l_out": {"a": one, "b": one},
        "ffn_act": {"gate": (1, 256)},
        "result_norm": {"x": one, "weight": (128,)},
        "result_output": {"x": one, "table_rows": (64, 128), "features": (64,)},
    }
    name = taps.parse(tap).tap
    if name in expected:
        assert {k: v for k, v in shapes.items() if k not in ("recorded", "bound")} == expected[name]
    assert shapes["recorded"] == shapes["bound"]
    assert made.arrays["recorded"].shape[token_axis(tap)] == 1


def test_keys_behind_the_token_are_left_out(engine: Altered, weights: SpecWeights) -> None:
    def change(index: int, name: str, given: TapArray) -> TapArray:
        if (index, name) == (0, "blk.0.kq"):
            given.array[1, 2, 1] += 1.0
        return given

    made = repro.build(found(engine, weights, change), "the engine")
    assert made.arrays["k"].shape[0] == made.arrays["recorded"].shape[-1] == 3
    assert "position 2" in made.script


def test_a_value_that_is_not_finite_is_wrong(
    engine: Altered, weights: SpecWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = found(engine, weights, wrong(0, "blk.1.ffn_up", np.nan))
    assert finding.check.status == "invalid"
    code, text = judged(repro.write(finding, "x", tmp_path), None, capsys)
    assert (code, text.splitlines()[0]) == (1, "wrong: 1 of 64 values are outside their bounds")
    assert ": nan, correct is " in text


def test_another_shape_is_wrong(
    engine: Altered, weights: SpecWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = repro.write(found(engine, weights, wrong(0, "blk.1.ffn_act")), "x", tmp_path)
    np.save(tmp_path / "other.npy", np.zeros((1, 3), np.float32))
    code, text = judged(script, tmp_path / "other.npy", capsys)
    assert (code, text) == (1, "wrong: shape (1, 3), expected (1, 256)\n")


def test_the_script_stands_alone(engine: Altered, weights: SpecWeights, tmp_path: Path) -> None:
    script = repro.write(found(engine, weights, wrong(1, "blk.1.kq")), "the engine", tmp_path / "new" / "folder")
    assert sorted(path.name for path in script.parent.iterdir()) == ["inputs.npz", "repro.py"]
    tree = ast.parse(script.read_text())
    imported = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"sys", "pathlib", "numpy"}
    assert "crossval" not in script.read_text()
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, cwd="/", timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("wrong: 1 of 12 values are outside their bounds\nworst: index (")


@pytest.mark.usefixtures("unnamed_segments")
def test_only_what_was_recorded_op_by_op_can_be_reproduced(
    make_model: Callable[..., Path], weights: SpecWeights, tmp_path: Path
) -> None:
    class Coarse(Stranger):
        def eval(self, token_ids: Any, select: Any) -> Any:
            return super().eval(token_ids, [name for name in select if name in taps.of_model(2, outline=True)])

    with Coarse(make_model(), n_threads=1) as runner:
        runner.fault = Fault(rolled_from="1/ffn_sub_norm")
        source = Capture(runner, weights.config, PLANS)
        (result,) = audit([source], weights)
        finding = findings.find("candidate", source, result, weights)
    assert finding is not None
    assert "record every tap of layer 1" in (repro.why_not(finding) or "")
    with pytest.raises(ValueError, match="not recorded"):
        repro.write(finding, "x", tmp_path)


def test_places_that_cannot_be_written(tmp_path: Path, engine: Altered, weights: SpecWeights) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInputError, match="cannot write a reproducer"):
            repro.check_writable(place)
        with pytest.raises(BadInputError, match="cannot write a reproducer"):
            repro.write(found(engine, weights, wrong(0, "blk.0.l_out")), "x", place)
    repro.check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_hostile_names_stay_in_the_docstring() -> None:
    text = 'x"""\\\nimport os'
    facts = repro_script.Facts("blk.0.ffn_act", SquaredRelu, text, 0, "prefill", 3, text, {}, (1, 4), False)
    tree = ast.parse(repro_script.render(facts))
    assert {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names} == {
        "sys",
        "numpy",
    }
