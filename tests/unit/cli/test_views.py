"""``--floors`` and ``--causal``: when they are rejected, with which message, and what their receipts must hold."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossval import registry, schema
from crossval.api import views
from crossval.api.request import Request
from crossval.causal import receipt as causal_receipt
from crossval.causal import show as render_causal
from crossval.causal import view as causal
from crossval.causal.view import LayerEffect
from crossval.cli.exits import exit_code
from crossval.compare.rows import Skip
from crossval.console import console
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.session import Prompt, Session
from crossval.examine.layers_receipt import LAYERS
from crossval.model import taps
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.registry import show_receipt
from crossval.repeat import floors_show as render_floors
from crossval.repeat.floors import FloorTable
from tests.support import receipt_samples as samples
from tests.support.strangers import PROMPT, Fault, Stranger, error_line, run

Record = Callable[..., Path]
SETTINGS = {"n_threads": 2, "n_decode": 2, "n_steps": None, "full": False}
ERRORS = {(0, "blk.1.l_out"): 1e-3, (0, "blk.0.q"): 1e-3, (1, "blk.1.l_out"): 1e-3, (2, "result_output"): 1e-2}


def made(
    floors: dict[str, Any] | None = None, causal: dict[str, Any] | None = None, errors: Any = None
) -> receipt.Receipt:
    result = samples.layers_result(errors or {})
    given = {"floors": floors or samples.floors_of(result), "causal": causal}
    return samples.build(result, samples.context(), None, {k: v for k, v in given.items() if v is not None})


DISAGREEING = {
    "errors": {
        (0, "blk.1.l_out"): 1e-3,
        (1, "blk.1.l_out"): 1e-3,
        (2, "blk.1.l_out"): 1e-3,
        (2, "result_output"): 1e-2,
    },
    "causal": samples.causal_of(0.01, [0.0, 0.0, 0.0099]),
}


def shown(what: receipt.Receipt) -> str:
    out = io.StringIO()
    show_receipt(console(out), what)
    return out.getvalue()


# --- the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["layers", "triage"])
def test_floors_of_what_cannot_be_run_in_another_way_are_a_usage_error(
    command: str, model_path: Path, golden: Path
) -> None:
    for reference in ("spec", golden):
        result = run(command, "--prompt", PROMPT, "--model", model_path, "--reference", reference, "--floors")
        assert result.exit_code == 2, result.output
        assert "--floors needs a live engine as the reference" in result.stderr


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_a_reference_that_turns_out_to_be_recorded_has_no_floors(
    model_path: Path, record: Record, tmp_path: Path
) -> None:
    model, out = tmp_path / "m.gguf", tmp_path / "r.json"
    model.symlink_to(model_path)
    (tmp_path / "m.goldens").mkdir()
    (tmp_path / "m.goldens" / "one").symlink_to(record())
    result = run("layers", "--prompt", PROMPT, "--model", model, "--floors", "--receipt", out)
    assert result.exit_code == 3, result.output
    assert "our own engine does not stand in for it" in error_line(result)
    assert receipt.read(out)["verdict"] == "incomplete"
    assert run("gate", out).exit_code == 1
    assert run("layers", "--prompt", PROMPT, "--model", model).exit_code == 0


def test_a_prompt_of_one_token_has_no_floors(model_path: Path) -> None:
    request = Request(LAYERS, model_path, floors=True)
    with BitnetPyRunner(model_path) as live, pytest.raises(Exception, match="at least 2 tokens") as error:
        views.check_reference(request, live, Prompt("a", (1,), True))
    assert getattr(error.value, "exit_code", None) == 2


@pytest.mark.parametrize("n_tokens", [2, 3, 4, 9])
def test_a_short_prompt_is_enough(n_tokens: int, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bitnet.cpp is ever a live reference; here our engine stands in for it, so that no library is needed."""
    request = Request(LAYERS, model_path, floors=True)
    monkeypatch.setattr(Session, "reopen", lambda self, side, **asked: BitnetPyRunner(self.model.path, **asked))
    session = request.session(request.load_model())
    prompt = Prompt(None, tuple(range(3, 3 + n_tokens)), True)
    with BitnetPyRunner(model_path) as ours:
        found, notes = views.make(request, session, (ours, ours), prompt, samples.layers_result())
    assert notes == []
    table = FloorTable.from_json(found["floors"]["table"])
    assert table.n_tokens == (n_tokens,)
    assert {floor.tap for floor in table.floors} == set(taps.of_model(2))
    assert table.unmeasured == ()


def test_a_reference_that_gives_nan_has_no_floors_and_the_comparison_stays(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nan(Stranger):
        fault = Fault(invalid="blk.1.ffn_up")

    request = Request(LAYERS, model_path, floors=True)
    monkeypatch.setattr(Session, "reopen", lambda self, side, **asked: Nan(self.model.path, **asked))
    session = request.session(request.load_model())
    with Nan(model_path) as engine:
        prompt = Prompt(None, (1, 2, 3), True)
        found, notes = views.make(request, session, (engine, engine), prompt, samples.layers_result())
    assert found == {}
    assert len(notes) == 1
    assert "no floors" in notes[0]


def test_the_causal_view_of_equal_engines(model_path: Path, golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--receipt", out)
    result = run("layers", *words, "--causal")
    assert result.exit_code == 0, result.output
    assert "the logits of the last token are bit-identical" in result.stdout
    assert "tolerance  none is needed: no value differs" in result.stdout
    assert run("gate", out).exit_code == 0
    assert "disagreement" not in run("layers", *words).stdout
    assert "causal" not in receipt.read(out)


def test_a_causal_view_that_cannot_be_made_is_said_and_is_no_pass(
    model_path: Path, record: Record, tmp_path: Path
) -> None:
    """Logits alone: nothing to patch. The comparison itself is incomplete; with all rows it is not."""
    out = tmp_path / "r.json"
    coarse = record(taps=("result_output",))
    result = run("diff", coarse, record(), "--model", model_path, "--causal", "--receipt", out)
    assert result.exit_code == 3, result.output
    assert "note: no causal view: no layer's l_out was recorded by both engines" in result.stdout
    kept = receipt.read(out)
    assert kept["settings"]["causal"] is True
    assert "causal" not in kept
    assert exit_code({**kept, "verdict": "parity"}) == 3
    checks = {check.name: check for check in registry.judge(kept)}
    assert (checks["causal"].passed, checks["causal"].detail) == (False, "asked for, but not made: see the notes")


def test_nan_is_reported_and_does_not_take_the_comparison_along(
    model_path: Path, record: Record, golden: Path, tmp_path: Path
) -> None:
    nan = record(name="mine", fault=Fault(invalid="blk.1.l_out"))
    result = run("diff", nan, golden, "--model", model_path, "--causal", "--receipt", tmp_path / "r.json")
    assert result.exit_code == 3, result.output
    assert "note: no causal view: candidate: blk.1.l_out holds NaN" in result.stdout
    assert "no tolerance would do" in result.stdout


# --- for people -----------------------------------------------------------------------------------------------


def test_rows_are_told_in_multiples_of_their_floor() -> None:
    what = made(errors=ERRORS)
    text = shown(what)
    assert "relative error over its measured floor" in text
    times = {(one["pass_index"], one["tap"]): one for one in what["floors"]["multiples"]}
    assert set(times) == set(ERRORS)
    assert times[0, "blk.1.l_out"]["times"] == pytest.approx(1e-3 / 1e-5 * 0.7, rel=0.1)  # every second element
    assert times[0, "blk.0.q"]["times"] is None
    worst = max(ERRORS.values()) / 1e-5 * 0.7
    assert (
        f"{len(ERRORS)} rows differ, by up to {times[2, 'result_output']['times']:.3g} times their floor" in text
    )
    assert times[2, "result_output"]["times"] == pytest.approx(worst, rel=0.1)
    assert (
        "1 rows have no multiple, first pass 0 blk.0.q: differs, where the engine repeats itself bit for bit"
        in text
    )
    assert "of the bounds in force would be enough" in text


def test_floors_that_were_not_measured_are_said() -> None:
    result = samples.layers_result()
    section = samples.floors_of(result, samples.floor_table([("blk.0.k", "1 threads")]))
    lines = list(render_floors.summary_lines(section))
    assert lines[1] == "not measured: 1, first blk.0.k, 1 threads: the engine did not give it"
    assert lines[2] == "no row differs, so none is a multiple of its floor"


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({}, "none is needed: no value differs"),
        ({(0, "blk.0.l_out"): 1e-4}, "of the bounds in force would be enough (pass 0 blk.0.l_out)"),
        ({(0, "blk.0.l_out"): 0.2}, "times the bounds in force would be needed to pass (pass 0 blk.0.l_out)"),
        ({(0, "inp_embd"): 0.2}, "no tolerance would do"),
        ({(0, "inp_embd"): 1e-7}, "no value differs but for the embedding"),
    ],
)
def test_the_smallest_tolerance_in_a_line(errors: dict[tuple[int, str], float], words: str) -> None:
    assert words in render_floors.tolerance_line(samples.layers_result(errors).rows)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (
            samples.causal_of(0.01, [0.0, 0.0099, 0.0099]),
            [
                "(99 % of KL 0.01) arises between the embedding and the output of layer 0",
                "nothing is recovered from the output of layer 0 on: the error entered before that",
                "it is the candidate that departs there from the specification: from the embedding on its "
                "logits are 0.3 away, the reference's 1e-05",
            ],
        ),
        (
            samples.causal_of(0.01, [0.0099, 0.0099, 0.0099], own=[(1e-5, 1e-5)] * 3),
            [
                "most of the disagreement (99 % of KL 0.01) arises in the embedding",
                "nothing is recovered from the embedding on",
            ],
        ),
        (
            samples.causal_of(0.01, [0.0, 0.0001, 0.0001], own=[(1e-5, 0.3)] * 3),
            [
                "(99 % of KL 0.01) arises after the output of layer 1, in the final norm or the head",
                "it is the reference that departs there from the specification: from the output of layer 1 on its "
                "logits are 0.3 away, the candidate's 1e-05",
            ],
        ),
        (
            samples.causal_of(0.01, [0.003, 0.006, 0.009], own=[(1e-4, 1e-4)] * 3),
            ["the largest part of the disagreement (30 % of KL 0.01) arises "],
        ),
        (
            samples.causal_of(0.01, [0.0, 0.005, 0.0099], noise=0.005),
            ["(KL 0.01) does not stand out from rounding noise: it is less than 4 times KL 0.005"],
        ),
        (
            samples.causal_of(0.0, [0.0] * 3, own=[(1e-5, 1e-5)] * 3),
            ["the logits of the last token give the same"],
        ),
        (
            {**samples.causal_of(0.01, [0.0, 0.0099]), "not_patched": ["blk.0.l_out"]},
            ["", "", "", "not patched, because an engine did not give all tokens: the output of layer 0"],
        ),
    ],
)
def test_the_view_in_plain_words(view: dict[str, Any], expected: list[str]) -> None:
    what = made(causal=view, errors={(2, "result_output"): 1e-2})
    assert what["verdict"] == "parity"
    if view["reliable"]:
        first = next(render_causal.conclusions(what))
        assert first.startswith("no operation of either engine is wrong: this is rounding")
        assert not any("departs" in line for line in render_causal.conclusions(what))
    what = {**what, "verdict": "candidate_defect"}
    lines = list(render_causal.conclusions(what))
    assert len(lines) >= len(expected)
    for line, words in zip(lines, expected, strict=False):
        assert words in line or line.startswith(words)
    text = shown(what)
    assert all(f"causal     {line}" in text for line in lines)


def test_of_many_layers_those_are_shown_where_something_happens() -> None:
    kls = [0.0] * 17 + [0.0099] * 14
    names = ["inp_embd", *(f"blk.{i}.l_out" for i in range(30))]
    effects = [
        LayerEffect(tap, taps.parse(tap).layer, kl, *share, 1e-5, 1e-5, kl == 0.0)
        for tap, kl, share in zip(names, kls, causal.shares(0.01, kls), strict=True)
    ]
    view = causal.CausalView(0.01, tuple(effects), "blk.16.l_out", "blk.16.l_out", 1e-4, True, ())
    out = io.StringIO()
    console(out).print(render_causal.effects_table(causal_receipt.to_json(view)))
    text = out.getvalue()
    assert "layer 15" in text
    assert "layer 16" in text
    assert "layer 29" in text
    assert "…" in text
    assert len(text.splitlines()) < 22


# --- a receipt of them ----------------------------------------------------------------------------------------


def complaints_of(what: receipt.Receipt, name: str) -> list[str]:
    assert schema.validator("receipt.v1").is_valid({**what, "digest": receipt.digest(what)})
    return gate.complaints(registry.KINDS[what["kind"]].kind, what)[name]


def test_what_the_commands_write_stands() -> None:
    what = made(**DISAGREEING)
    assert complaints_of(what, "floors") == complaints_of(what, "causal") == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("table", "engine"), "bitnet_py", "the reference is bitnet.cpp"),
        (("table", "n_layers"), 3, "floors of 3 layers"),
        (("table", "n_tokens"), [4], r"floors of prompts of \[4\] tokens, the prompt has 3"),
        (("table", "floors", 0, "tap"), "blk.2.q", "does not have"),
        (("table", "floors", 0, "variation"), "3 threads", "inp_embd, 1 threads: neither measured"),
        (("table", "floors", 23, "n_elements"), 11, "blk.0.kq, .*: 11 elements, the model's shape gives 12"),
        (("table", "floors", 23, "n_elements"), 0, "0 elements"),
        (("table", "floors", 23, "n_different"), 13, "13 of 12 elements differ"),
        (("table", "floors", 23, "n_different"), 0, "no element differs"),
        (("table", "floors", 23, "worst_token_rel_l2"), 1e-6, "below the whole tap's"),
        (("table", "floors", -1, "worst_token_rel_l2"), 0.5, "no element differs|one token was compared"),
        (("table", "unmeasured"), [["inp_embd", "1 threads", "lost"]], "both measured and not"),
        (("multiples", 0, "times"), 1.0, "multiples are not what rows and floors give"),
        (("multiples", 0, "text"), "equal", "multiples are not what rows and floors give"),
        (("multiples",), [], "multiples are not what rows and floors give"),
    ],
)
def test_floors_that_contradict_the_receipt(path: tuple[Any, ...], value: Any, words: str) -> None:
    what = samples.forge(made(**DISAGREEING), "floors", *path, value)
    found = complaints_of(what, "floors")
    assert any(re.search(words, line) for line in found), found


def test_floors_of_a_recorded_reference_are_refused() -> None:
    what = samples.forge(made(), "reference", "status", "recorded")
    assert "floors of bitnet.cpp, the reference is bitnet.cpp, recorded" in complaints_of(what, "floors")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("reliable",), False, "reliable is False, the effects say True"),
        (("largest",), "blk.0.l_out", "largest is blk.0.l_out, the effects say blk.1.l_out"),
        (("nothing_recovered_from",), None, "nothing_recovered_from is None"),
        (("baseline_kl",), 0.02, "recovered and introduced are not what"),
        (("noise_kl",), 0.02, "reliable is True, the effects say False"),
        (("effects", 2, "kl"), 0.005, "recovered and introduced are not what"),
        (("effects", 1, "kl"), 0.001, "equal states, but the KL after patching is 0.001"),
        (("effects", 1, "equal_states"), False, "equal_states is False, the rows say True"),
        (("effects", 2, "equal_states"), True, "equal_states is True, the rows say False"),
        (("effects", 2, "recovered"), 0.5, "recovered and introduced"),
        (("effects", 2, "layer"), 0, "its layer is 0"),
        (("effects", 2, "tap"), "blk.0.l_out", "not states after layers of this model"),
        (("effects", 1, "tap"), "blk.0.q", "not states after layers of this model"),
        (("not_patched",), ["blk.0.l_out"], "has to be either patched or not"),
        (("not_patched",), ["inp_embd"], "need not be patched"),
    ],
)
def test_a_view_that_contradicts_itself_or_the_rows(path: tuple[Any, ...], value: Any, words: str) -> None:
    found = complaints_of(samples.forge(made(**DISAGREEING), "causal", *path, value), "causal")
    assert any(words in line for line in found), found


def test_a_view_must_fit_the_logits() -> None:
    what = made(**DISAGREEING)
    equal = made(causal=DISAGREEING["causal"])
    assert any("the logits are bit-identical" in line for line in complaints_of(equal, "causal"))
    far = samples.causal_of(1.0, [0.0, 0.0, 0.99])
    found = complaints_of(samples.forge(what, "causal", far), "causal")
    assert any("is more than logits" in line for line in found), found


def test_a_state_that_both_engines_gave_must_be_patched_and_no_other() -> None:
    what = made(**DISAGREEING)
    left = samples.causal_of(0.01, [0.0, 0.0099])
    found = complaints_of(samples.forge(what, "causal", left), "causal")
    assert "inp_embd: both engines gave it, but it was not patched" in found
    result = samples.layers_result(DISAGREEING["errors"], (Skip(1, "inp_embd", "not given"),))
    views_ = {"causal": DISAGREEING["causal"]}
    found = complaints_of(samples.build(result, samples.context(), None, views_), "causal")
    assert "inp_embd: it was patched, but the rows do not hold all its tokens" in found


@pytest.mark.parametrize("name", ["floors", "causal"])
def test_asked_for_and_there_go_together(name: str) -> None:
    what = made(**DISAGREEING)
    without = {key: value for key, value in what.items() if key != name}
    assert complaints_of(without, name) == ["asked for, but not made: see the notes"]
    silent = {**what, "settings": {k: v for k, v in what["settings"].items() if k != name}}
    assert complaints_of(silent, name) == ["there, but not asked for"]


@pytest.mark.parametrize("kind", ["greedy", "smoke"])
def test_other_kinds_of_receipt_hold_neither(kind: str) -> None:
    other = samples.greedy_receipt() if kind == "greedy" else samples.smoke_receipt()
    views_ = made(**DISAGREEING)
    check = schema.validator("receipt.v1")
    assert check.is_valid(other)
    for name in ("floors", "causal"):
        assert not check.is_valid({**other, name: views_[name]})
        assert not check.is_valid({**other, "settings": {**other["settings"], name: True}})
