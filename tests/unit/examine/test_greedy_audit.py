"""The audit behind a greedy comparison: which passes, and that what is watched is what was compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.audit.summary import audit_verdict
from crossval.compare.greedy import compare_greedy
from crossval.compare.rows import GreedyPrompt
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import record_trace, trace_model
from crossval.engines.recorded import RecordedRunner
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError
from crossval.examine.greedy_audit import audit_prompt, audited_passes
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord, Runner, TapArray
from crossval.receipts import file as receipt
from tests.support.strangers import PROMPT, Fault, Stranger, run

Record = Callable[..., Path]
IDS = (3, 14, 15, 9, 26)


class Shy(BitnetPyRunner):
    """Computes something else while its tensors are looked at."""

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = super().eval(token_ids, select)
        given = record.taps.get("result_output")
        if given is None or len(select) < 3:
            return record
        return replace(record, taps={**record.taps, "result_output": TapArray(given.array * 2, given.rows)})


def compared(candidate: Runner, reference: Runner, steps: int, ids: Sequence[int] = IDS) -> GreedyPrompt:
    return compare_greedy(candidate, reference, ids, steps, n_layers=2).prompts[0]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_prompt_and_one_decoded_token_are_audited(model_path: Path, steps: int) -> None:
    with BitnetPyRunner(model_path, n_threads=1) as ours, SpecRunner(model_path) as theirs:
        prompt = compared(ours, theirs, steps)
        found = audit_prompt(ours, theirs, prompt, SpecWeights(model_path))
    kinds = [(one.kind, one.start, one.token_ids) for one in found.passes]
    assert kinds == [("prefill", 0, IDS), ("decode", 5, prompt.reference_tokens[:1])][: min(steps, 2)]
    assert [audit_verdict(audit) for audit in found.audits.values()] == ["clean", "clean"]
    assert all(audit is not None and audit["n_ops"] == 43 * len(kinds) for audit in found.audits.values())
    assert (found.findings, found.notes) == ((), ())


def test_a_trace_is_audited_in_the_passes_it_was_fed(model_path: Path, tmp_path: Path) -> None:
    with BitnetPyRunner(model_path, n_threads=1) as ours, Stranger(model_path, n_threads=1) as other:
        record_trace(other, trace_model(model_path), tmp_path / "t", prompt_ids=IDS, n_decode=3)
        trace = RecordedRunner(tmp_path / "t")
        prompt = compared(ours, trace, 3)
        assert audited_passes(ours, trace, prompt) == trace.plan[:2]
        assert audited_passes(trace, other, compared(trace, other, 3)) == trace.plan[:2]
        with pytest.raises(BadInputError, match="other tokens"):
            audited_passes(ours, trace, compared(ours, other, 3, ids=(1, 2, 3)))


def test_an_engine_that_changes_when_it_is_watched_is_not_audited(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Shy(model_path, n_threads=1) as ours, Stranger(model_path, n_threads=1) as theirs:
        prompt = compared(ours, theirs, 3)
        assert all(step.logits.bitwise_equal for step in prompt.steps)
        found = audit_prompt(ours, theirs, prompt, SpecWeights(model_path))
    assert found.audits["candidate"] is None
    assert audit_verdict(found.audits["reference"]) == "clean"
    assert found.findings == ()
    assert found.notes == ("the candidate was not audited: its logits change when its tensors are captured",)
    monkeypatch.setattr(
        "crossval.engines.session.open_candidate", lambda word, model, **_: Shy(model, n_threads=1)
    )
    monkeypatch.setattr("crossval.engines.session.open_reference", lambda word, model, *_, **__: Stranger(model))
    out = tmp_path / "r.json"
    result = run("greedy", "--prompt", PROMPT, "--steps", "3", "--model", model_path, "--receipt", out)
    assert result.exit_code == 3, result.output
    assert "note: the candidate was not audited: its logits change" in result.stdout
    assert failures(out) == ["verdict", "audit of the candidate"]


def failures(out: Path) -> list[str]:
    return [line.split("FAIL")[0].strip() for line in run("gate", out).stdout.splitlines() if " FAIL " in line]


def test_a_near_tie_is_one_only_when_both_engines_are_right(
    model_path: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's last choice is turned around by a hair, once, behind everything that is audited."""
    with Stranger(model_path, n_threads=1) as runner:
        ids = runner.tokenize(PROMPT)
    tie = Tie(len(ids) + 2)
    monkeypatch.setattr("crossval.engines.session.open_candidate", lambda word, model, **_: tie.engine(model))
    out = tmp_path / "r.json"
    words = ("--prompt", PROMPT, "--steps", "5", "--model", model_path, "--receipt", out)
    for trace, code, near_tie in (
        (record(n_decode=4), 1, True),
        (record(n_decode=4, taps=("result_output",)), 1, False),
        (record(n_decode=4, fault=Fault(scaled=(("blk.0.ffn_act", 1.01),))), 1, False),
    ):
        result = run("greedy", *words, "--reference", trace)
        assert result.exit_code == code, result.output
        made = receipt.read(out)
        step = made["results"]["prompts"][0]["steps"][3]
        assert (step["candidate_token"] != step["reference_token"], step["logits"]["status"]) == (True, "within")
        assert step["near_tie"] is near_tie
        assert ("a near tie" in result.stdout, "near tie" in result.stdout) == (near_tie, near_tie)
        failed = [
            line.split("FAIL")[0].strip() for line in run("gate", out).stdout.splitlines() if " FAIL " in line
        ]
        assert failed == (["verdict"] if near_tie else ["verdict", "audit of the reference"])


class Tie:
    """An engine whose two best logits are exchanged at one position, and equal to the right ones elsewhere."""

    def __init__(self, position: int) -> None:
        self.position = position

    def engine(self, model: Path) -> BitnetPyRunner:
        position = self.position

        class Engine(BitnetPyRunner):
            def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
                record = super().eval(token_ids, select)
                given = record.taps.get("result_output")
                if given is not None and record.plan.positions[-1] == position:
                    second, first = given.array[-1].argsort()[-2:]
                    given.array[-1][[second, first]] = given.array[-1][[first, second]]
                return record

        return Engine(model, n_threads=1)
