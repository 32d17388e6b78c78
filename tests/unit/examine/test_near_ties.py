"""Tokens that differ from the specification's: an audit tells near ties from errors, never from parity."""

from __future__ import annotations

import dataclasses
import io

import pytest

from crossval import schema
from crossval.api.generation import _with_audits
from crossval.cli.exits import exit_code
from crossval.console import console
from crossval.examine import greedy_audit
from crossval.examine.greedy_audit import GreedyAudit, audit_differing, audited_passes
from crossval.examine.greedy_verdict import PromptAudit, only_near_ties
from crossval.receipts.party import Party
from crossval.receipts.policy import Policy
from crossval.registry import judge, show_receipt
from tests.support import receipt_samples as samples

SPEC = Party("live", dataclasses.replace(samples.THEIRS, name="specification"))
WRONG = samples.audits(
    samples.audit_result({(1, "blk.1.q"): 8.0}, plan=samples.GREEDY_PLAN), plan=samples.GREEDY_PLAN
)
CLEAN = samples.audits(plan=samples.GREEDY_PLAN)


OTHER_TOKENS = {**samples.TOKENIZER, "engines_agree": False}


def receipt(differs_at=1, **changes):
    return samples.greedy_receipt(differs_at, policy="independent", **{"reference": SPEC, **changes})


def failed(made):
    policy = Policy(reference_names=("specification",), require_live=False)
    return {check.name: check.detail for check in judge(made, policy) if not check.passed}


def test_a_near_tie_in_audited_passes_is_no_error_and_no_parity():
    made = receipt()
    assert (made["verdict"], made["parity"]["status"], exit_code(made)) == ("near_ties", "divergence", 0)
    assert made["parity"]["exact_match_rate"] < 1
    assert failed(made) == {}
    out = io.StringIO()
    show_receipt(console(out), made)
    assert "NEAR_TIES  " in out.getvalue()
    assert "not parity of two" in out.getvalue()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"reference": Party("live", samples.THEIRS)}, "divergence"),  # another engine: who is right is not shown
        ({"differs_at": 2}, "divergence"),  # after the passes that were audited
        ({"held": WRONG}, "candidate_defect"),
        ({"held": {}}, "divergence"),  # nothing was audited
        ({"held": {**CLEAN, "candidate": samples.coarse_audit()}}, "divergence"),  # flips may explain it
        ({"differs_at": None}, "parity"),
        ({"tokenizer": OTHER_TOKENS}, "divergence"),  # the prompts were read otherwise, too
        ({"differs_at": None, "tokenizer": OTHER_TOKENS}, "divergence"),
    ],
    ids=[
        "another engine", "a later token", "a wrong operation", "no audit", "audited in part", "equal tokens",
        "tokenizers disagree", "equal tokens, tokenizers disagree",
    ],
)  # fmt: skip
def test_anything_else_stays_what_it_was(changes, verdict):
    assert receipt(**changes)["verdict"] == verdict


def test_without_a_token_that_differs_there_is_no_near_tie():
    parties = ("specification", "bitnet.cpp")
    assert only_near_ties(samples.greedy_result(differs_at=1, policy="independent"), parties)
    assert not only_near_ties(samples.greedy_result(policy="independent"), parties)


def test_the_gate_recomputes_it():
    made = receipt()
    forged = samples.forge(receipt(2), "verdict", "near_ties")
    assert "verdict" in failed(forged)
    beyond = samples.forge(made, "results", "prompts", 0, "steps", 1, "logits", "nmse", 0.5)
    assert "verdict" in failed(beyond)
    other = samples.forge(made, "reference", "name", "llama.cpp")
    assert "verdict" in failed(other)


def later(wrong=None):
    """Audits of the second prompt: clean, or one operation of one engine is wrong."""
    held = samples.audits(plan=samples.LATER_PLAN)
    if wrong is not None:
        result = samples.audit_result({(1, "blk.1.q"): 8.0}, plan=samples.LATER_PLAN)
        held[wrong] = samples.audits(result, plan=samples.LATER_PLAN)["candidate"]
    return held


def test_a_later_prompt_has_near_ties_where_it_was_audited_itself():
    made = samples.later_receipt()
    assert (made["verdict"], exit_code(made)) == ("near_ties", 0)
    assert failed(made) == {}
    beyond = samples.later_receipt(differs_at=2)  # a token after the last one audited
    assert (beyond["verdict"], exit_code(beyond)) == ("divergence", 1)
    without = samples.forge(made, "results", {k: v for k, v in made["results"].items() if k != "further"})
    assert "verdict" in failed(without)
    for place in ((), (1,), (0,)):
        of_another = [{**made["results"]["further"][0], "prompt_index": index} for index in place]
        forged = samples.forge(made, "results", "further", of_another or [made["results"]["further"][0]] * 2)
        assert bool(failed(forged)) == (place != (1,)), place


def test_a_later_prompt_that_was_audited_in_part_leaves_a_divergence():
    made = samples.later_receipt({**later(), "candidate": samples.coarse_audit()})
    assert (made["verdict"], exit_code(made)) == ("divergence", 1)


@pytest.mark.parametrize(
    ("side", "verdict"), [("candidate", "candidate_defect"), ("reference", "reference_defect")]
)
def test_what_is_wrong_in_a_later_prompt_only_is_the_verdict(side, verdict):
    made = samples.later_receipt(later(side))
    assert (made["verdict"], exit_code(made)) == (verdict, 1)
    assert {name for name in failed(made) if "audit" in name} == {f"audit of the {side}, prompt 1"}
    assert failed(made).keys() >= {"verdict"}
    assert "structure" not in failed(made)  # it is no near tie
    out = io.StringIO()
    show_receipt(console(out), made)
    assert "Audited, too: prompt 1" in out.getvalue()
    assert "WRONG  layer 1, op q (pass 1, decode)" in out.getvalue()
    assert f"{verdict.upper()}  " in out.getvalue()
    hidden = samples.forge(made, "results", "further", 0, "audit", later())
    assert "audits" in failed(hidden)  # its diagnosis is of nothing


def test_the_schema_takes_as_many_audited_passes_as_there_may_be():
    made = receipt()
    first, second = made["results"]["passes"]
    many = [first, *({**second, "start": 3 + i} for i in range(5000))]
    schema.validate({**made, "results": {**made["results"], "passes": many}})


@pytest.mark.parametrize(("wrong", "named"), [(None, True), ("candidate", False), ("reference", False)])
def test_near_ties_are_named_in_the_light_of_all_audits(wrong, named):
    made = samples.greedy_result(3, differs_at=1, policy="independent", where=1)
    steps = [dataclasses.replace(one, near_tie=one.near_tie and False) for one in made.prompts[1].steps]
    prompts = (made.prompts[0], dataclasses.replace(made.prompts[1], steps=tuple(steps)))
    first = PromptAudit(0, samples.GREEDY_PLAN, CLEAN)
    told = _with_audits(
        dataclasses.replace(made, prompts=prompts), first, [PromptAudit(1, samples.LATER_PLAN, later(wrong))]
    )
    assert told.prompts[1].steps[1].near_tie is named


class Runs:
    """Counts what is audited; prompts of these indices are not clean."""

    def __init__(self, *unclean):
        self.unclean, self.seen = unclean, []

    def __call__(self, ours, theirs, prompt, weights, *, progress=None):
        self.seen.append(prompt.prompt_ids[-1] - 42)
        wrong = self.seen[-1] in self.unclean
        return GreedyAudit(samples.LATER_PLAN, later("candidate" if wrong else None))


@pytest.mark.parametrize(
    ("name", "first", "unclean", "expected"),
    [
        ("specification", None, (), [1, 2, 3]),
        ("specification", None, (2,), [1, 2]),
        ("specification", "candidate", (), []),
        ("bitnet.cpp", None, (), []),
    ],
    ids=["all that differ", "until one is not clean", "the first is wrong", "another engine"],
)
def test_later_prompts_that_differ_are_audited(monkeypatch, name, first, unclean, expected):
    runs = Runs(*unclean)
    monkeypatch.setattr(greedy_audit, "audit_prompt", runs)
    result = samples.greedy_result(3, differs_at=1, n_prompts=5, policy="independent", where=1)
    more = [samples.greedy_result(3, 1, 5, policy="independent", where=where).prompts[where] for where in (2, 3)]
    result = dataclasses.replace(result, prompts=(*result.prompts[:2], *more, result.prompts[4]))
    engines = [(Engine("bitnet_py"), Engine(name))] * 5
    of_first = GreedyAudit(samples.GREEDY_PLAN, later(first))
    assert [index for index, _ in audit_differing(engines, result, None, of_first)] == expected == runs.seen
    monkeypatch.setattr(greedy_audit, "MOST_FURTHER", 1)
    assert len(list(audit_differing(engines, result, None, of_first))) == len(expected[:1])


class Engine:
    def __init__(self, name):
        self.identity = dataclasses.replace(samples.THEIRS, name=name)
        self.plan = None
        self.status = "live"
        self.max_pass = None


@pytest.mark.parametrize(("name", "n_decoded"), [("specification", 2), ("bitnet.cpp", 1)])
def test_the_audit_reaches_the_last_token_that_differs(name, n_decoded):
    prompt = samples.greedy_result(3, differs_at=2).prompts[0]
    plan = audited_passes(Engine("bitnet_py"), Engine(name), prompt)
    fed = [token for one in plan for token in one.token_ids]
    assert fed == [*prompt.prompt_ids, *prompt.reference_tokens[:n_decoded]]
