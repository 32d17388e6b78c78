"""Prompts longer than a pass: both engines get the same pieces, and everything takes several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crossval.api.request import Request
from crossval.capture import make_feed
from crossval.causal.view import view_of_engines
from crossval.compare.greedy import compare_greedy
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import record_trace, trace_model
from crossval.engines.recorded import RecordedRunner
from crossval.engines.spec import SpecRunner
from crossval.examine.examination import examine
from crossval.examine.layers_receipt import LAYERS
from crossval.model import taps
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, cut_prompt, longest_pass
from crossval.receipts import file as receipt
from crossval.repeat.floors import measure_floors
from tests.support.strangers import Fault, Stranger, run

IDS = (1, 17, 42, 250, 3, 9, 8, 100, 101)
PIECES = [4, 4, 1]
"""The prompt in passes of at most 4 tokens."""
TEXT = "What is the longest word that you know?"

Opened = Callable[..., Stranger]


@pytest.fixture
def opened(model_path: Path) -> Iterator[Opened]:
    """Return ``opened(n_ubatch, fault) -> entered engine``."""
    with ExitStack() as stack:

        def open_one(n_ubatch: int, fault: Fault | None = None) -> Stranger:
            runner = Stranger(model_path, n_threads=1, n_ubatch=n_ubatch)
            runner.fault = fault or Fault()
            return stack.enter_context(runner)

        yield open_one


def sizes(plans: tuple[PassPlan, ...]) -> list[int]:
    return [len(plan.token_ids) for plan in plans]


def test_a_prompt_is_cut_after_every_longest_pass() -> None:
    assert sizes(cut_prompt(IDS, 4)) == PIECES
    assert [plan.start for plan in cut_prompt(IDS, 4)] == [0, 4, 8]
    assert [plan.kind for plan in cut_prompt(IDS, 4)] == ["prefill", "prefill", "decode"]
    assert sizes(cut_prompt(IDS, 9)) == sizes(cut_prompt(IDS, None)) == [9]
    assert cut_prompt((), 4) == ()


def test_the_engine_that_takes_least_decides_and_a_trace_does_not(
    opened: Opened, model_path: Path, tmp_path
) -> None:
    short, long = opened(4), opened(6)
    assert longest_pass(long, short) == 4
    with SpecRunner(model_path) as spec:
        assert longest_pass(spec) is None
        assert longest_pass(spec, long) == 6
    record_trace(short, trace_model(model_path), tmp_path / "t", prompt_ids=IDS)
    assert longest_pass(RecordedRunner(tmp_path / "t"), long) == 6


def test_both_engines_get_the_same_pieces_and_are_examined_in_all_of_them(
    opened: Opened, model_path: Path
) -> None:
    found = examine(opened(4), opened(6), IDS, model_path, n_decode=2, full=True)
    assert sizes(found.result.plan) == [*PIECES, 1, 1]
    assert found.result.verdict == "parity"
    assert {row.pass_index for row in found.result.rows} == set(range(5))
    assert all(row.status == "equal" for row in found.result.rows)
    for audit in found.audits_json().values():
        assert audit is not None
        assert audit["verdict"] == "clean"
        assert audit["n_covered"] == audit["n_ops"] == 5 * len(audit["rows"])


def test_a_fault_is_found_in_the_piece_that_has_it(opened: Opened, model_path: Path) -> None:
    class Late(Stranger):
        def eval(self, token_ids, select):
            self.fault = Fault(scaled=(("blk.1.ffn_act", 2.0),)) if tuple(token_ids) == IDS[4:8] else Fault()
            return super().eval(token_ids, select)

    with Late(model_path, n_threads=1, n_ubatch=4) as ours:
        found = examine(ours, opened(4), IDS, model_path, n_decode=1, full=True)
    assert found.result.first_divergence is not None
    assert (found.result.first_divergence.pass_index, found.result.first_divergence.tap) == (1, "blk.1.ffn_act")


def test_greedy_counts_steps_after_the_whole_prompt(opened: Opened) -> None:
    short, long = opened(4), opened(6)
    (prompt,) = compare_greedy(short, long, IDS, 3, n_layers=2).prompts
    assert [step.logits.pass_index for step in prompt.steps] == [2, 3, 4]
    assert prompt.candidate_tokens == prompt.reference_tokens
    feed = make_feed(short, long, IDS, 2, 2)
    assert (feed.n_prompt_passes, feed.n_required, sizes(feed.expected)) == (3, 5, [4, 4, 1, 1, 1])


def test_a_recording_holds_every_piece_completely(opened: Opened, model_path: Path, tmp_path: Path) -> None:
    made = record_trace(
        opened(4), trace_model(model_path), tmp_path / "t", prompt_ids=IDS, n_decode=2, n_decode_full=1
    )
    assert sizes(tuple(one.plan for one in made.passes)) == [4, 4, 1, 1, 1]
    everything, outline = len(taps.of_model(2)), len(taps.of_model(2, outline=True))
    assert [len(one.taps) for one in made.passes] == [everything] * 4 + [outline]
    found = examine(RecordedRunner(tmp_path / "t"), opened(6), IDS, model_path)
    assert (sizes(found.result.plan), found.result.verdict) == ([4, 4, 1, 1, 1], "parity")


def test_views_take_several_passes(opened: Opened, model_path: Path) -> None:
    found = examine(opened(4), opened(4, Fault(rolled_from="1/ffn_sub_norm")), IDS, model_path, n_decode=1)
    view = view_of_engines(*found.captures, SpecWeights(model_path))
    assert view.largest == "blk.1.l_out"
    table = measure_floors(
        lambda **asked: Stranger(model_path, n_ubatch=4, **asked), [IDS], n_layers=2, thread_counts=(1,)
    )
    assert table.n_tokens == (9,)
    assert not table.unmeasured


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands open our engine, and a stranger as the reference, with passes of at most 4 tokens."""
    own = BitnetPyRunner.__init__

    def short(self: BitnetPyRunner, *args, n_ubatch: int = 4, **options) -> None:
        own(self, *args, **{"n_ubatch": n_ubatch, **options})

    monkeypatch.setattr(BitnetPyRunner, "__init__", short)
    monkeypatch.setattr(
        "crossval.engines.session.open_reference", lambda word, model, *_, **__: Stranger(model, n_threads=1)
    )


@pytest.mark.usefixtures("small_passes")
def test_receipts_of_long_prompts_pass_the_gate(model_path: Path, tmp_path: Path) -> None:
    layers, greedy = tmp_path / "layers.json", tmp_path / "greedy.json"
    common = ("--prompt", TEXT, "--model", model_path, "--threads", "1")
    result = run("layers", *common, "--decode", "2", "--receipt", layers)
    assert result.exit_code == 0, result.output
    assert run("greedy", *common, "--steps", "3", "--receipt", greedy).exit_code == 0
    result = run("gate", layers, greedy)
    assert result.exit_code == 0, result.output
    made = receipt.read(layers)
    passes = made["results"]["passes"]
    assert sum(len(one["token_ids"]) for one in passes) == len(made["prompt"]["token_ids"]) + 2
    assert max(len(one["token_ids"]) for one in passes) == 4
    assert made["settings"]["n_decode"] == 2


def test_a_trace_of_one_long_pass_is_answered_by_one(make_model, tmp_path: Path) -> None:
    """A live engine takes the passes that the other engine's trace has, even longer ones than its own."""
    model = make_model(n_layers=1)
    ids = tuple(range(3, 203)) * 3
    with Stranger(model, n_threads=1, n_ubatch=600) as runner:
        record_trace(runner, trace_model(model), tmp_path / "t", prompt_ids=ids, select_prefill=["blk.0.l_out"])
    request = Request(LAYERS, model, "bitnet_py", str(tmp_path / "t"), 1)
    with request.session(request.load_model()) as session:
        ours, theirs = session.open()
        assert ours.identity.settings["n_ubatch"] == 600
        found = examine(ours, theirs, ids, model, n_decode=0)
    assert found.result.first_inexact is None
