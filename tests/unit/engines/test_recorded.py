"""A trace as a runner, and goldens beside a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossval.engines.goldens import find_golden, goldens_dir, list_goldens
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import Runner
from crossval.traces.read import TraceModel
from tests.support.numpy_engine import MODEL, NumpyRunner

PROMPT = (3, 14, 15, 9)


def record(out: Path, text: str = "hello", ids: tuple[int, ...] = PROMPT, **options: object) -> Path:
    model = options.pop("model", MODEL)
    assert isinstance(model, TraceModel)
    record_trace(NumpyRunner(), model, out, prompt_ids=ids, prompt_text=text, **options)  # type: ignore[arg-type]
    return out


@pytest.fixture
def recorded(tmp_path: Path) -> RecordedRunner:
    return RecordedRunner(record(tmp_path / "t", n_decode=2))


def test_it_is_a_runner(recorded: RecordedRunner) -> None:
    runner: Runner = recorded
    with runner as entered:
        assert entered is recorded
        assert (entered.status, entered.identity) == ("recorded", NumpyRunner().identity)
        assert entered.plan is not None
        assert [plan.start for plan in entered.plan] == [0, 4, 5]
        assert entered.tokenize("hello") == list(PROMPT)


def test_it_gives_what_was_recorded_and_selected(recorded: RecordedRunner) -> None:
    live = NumpyRunner()
    for plan in recorded.plan:
        select = ["blk.1.l_out", "result_output", "blk.0.q"]
        ours, theirs = recorded.eval(plan.token_ids, select), live.eval(plan.token_ids, select)
        assert ours.plan == theirs.plan == plan
        assert set(ours.taps) == (set(select) if plan.start == 0 else {"blk.1.l_out", "result_output"})
        assert "blk.0.k" not in ours.taps
        for name, tap in ours.taps.items():
            np.testing.assert_array_equal(tap.array, theirs.taps[name].array)
    with pytest.raises(KeyError):
        recorded.trace.taps(0)["nonsense"]


def test_unselected_taps_are_not_reachable(recorded: RecordedRunner) -> None:
    with pytest.raises(KeyError):
        recorded.eval(PROMPT, ["inp_embd"]).taps["blk.0.q"]


def test_other_tokens_are_unavailable_and_the_message_says_what_is_there(recorded: RecordedRunner) -> None:
    with pytest.raises(UnavailableError, match=r"pass 0 records tokens \[3, 14, 15, 9\], not \[1\]"):
        recorded.eval((1,), [])
    recorded.eval(PROMPT, [])
    with pytest.raises(UnavailableError, match="pass 1 records tokens"):
        recorded.eval(PROMPT, [])


def test_past_the_end_is_unavailable_and_reset_starts_over(recorded: RecordedRunner) -> None:
    for plan in recorded.plan:
        recorded.eval(plan.token_ids, [])
    with pytest.raises(UnavailableError, match="records 3 passes"):
        recorded.eval((1,), [])
    recorded.reset()
    assert recorded.eval(PROMPT, []).plan.start == 0


def test_it_has_no_tokenizer(recorded: RecordedRunner) -> None:
    with pytest.raises(UnavailableError, match="its own prompt: 'hello'"):
        recorded.tokenize("other")


def test_goldens_lie_beside_their_model(tmp_path: Path) -> None:
    assert goldens_dir("models/a.b.gguf") == Path("models/a.b.goldens")
    model = tmp_path / "m.gguf"
    assert list_goldens(model) == []
    assert find_golden(model, MODEL.sha256, "hello") is None
    root = goldens_dir(model)
    hello = record(root / "hello")
    other = record(root / "other", text="bye", ids=(1, 2))
    (root / "unfinished").mkdir()
    (root / "README").write_text("not a trace")
    assert [golden.path for golden in list_goldens(model)] == [hello, other]
    assert find_golden(model, MODEL.sha256, "hello") == hello
    assert find_golden(model, MODEL.sha256, (1, 2)) == other
    assert find_golden(model, MODEL.sha256, list(PROMPT)) == hello
    assert find_golden(model, MODEL.sha256, "hell") is None
    assert find_golden(model, MODEL.sha256, (1,)) is None
    assert find_golden(model, "cd" * 32, "hello") is None
    (other / "trace.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"other/trace\.json"):
        find_golden(model, MODEL.sha256, "hello")


def test_the_richest_golden_is_chosen(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    root = goldens_dir(model)
    record(root / "a", n_decode=1)
    longer = record(root / "b", n_decode=3, select_prefill=["result_output"])
    record(root / "c", n_decode=2)
    assert find_golden(model, MODEL.sha256, "hello") == longer


def test_a_malformed_golden_is_an_error(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    record(goldens_dir(model) / "a")
    (goldens_dir(model) / "b").mkdir()
    (goldens_dir(model) / "b" / "trace.json").write_text("{")
    with pytest.raises(BadInputError, match=r"b/trace\.json"):
        find_golden(model, MODEL.sha256, "hello")
