"""Tokens that differ from the specification's: an audit tells near ties from errors, never from parity."""

from __future__ import annotations

import dataclasses
import io

import pytest

from crossval.cli.exits import exit_code
from crossval.console import console
from crossval.examine.greedy_audit import audited_passes
from crossval.examine.greedy_verdict import only_near_ties
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
