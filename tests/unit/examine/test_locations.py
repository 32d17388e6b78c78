"""The operation that an audit finds wrong, beside the place where the engines first differ."""

from __future__ import annotations

import io

import pytest

from crossval.console import console
from crossval.examine.locations import relations
from crossval.registry import show_receipt
from tests.support import receipt_samples as samples

GUILTY = {(0, "blk.1.ffn_act"): 8.0, (0, "blk.1.ffn_down"): 2.0}
LATER = {(0, "result_output"): 1.0}
WHERE = "layer 1, op ffn_act (pass 0, prefill) of the candidate"


def of_layers(guilty, errors):
    return samples.layers_receipt(errors, samples.audits(samples.audit_result(guilty)))


def shown(made):
    out = io.StringIO()
    show_receipt(console(out), made)
    return out.getvalue()


def test_what_enters_in_a_layer_and_shows_in_the_logits_is_told_apart():
    made = of_layers(GUILTY, LATER)
    assert made["first_divergence"]["tap"] == "result_output"
    (text,) = relations(made)
    assert text.startswith(
        f"cause: {WHERE}, wrong given its own inputs; effect: the first divergence, which is computed from it"
    )
    printed = shown(made)
    assert printed.index("first divergence: ") < printed.index(f"locations  {text}")
    table = printed.partition("Operations of layer 1 of the candidate, each against its own bound.")[2]
    lines = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    assert lines["ffn_act"][1:3] == ["WRONG", "8"]
    assert lines["ffn_down"][1:3] == ["WRONG", "2"]
    assert lines["ffn_up"][1] == "ok"
    of_layer = {name.removeprefix("blk.1.") for name in samples.taps.of_model(2) if name.startswith("blk.1.")}
    assert of_layer <= set(lines)


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ({(0, "blk.1.ffn_act"): 1.0}, []),
        ({(0, "blk.0.l_out"): 1.0}, [f"{WHERE} comes after the first divergence, and so does not explain it"]),
        ({}, []),
    ],
    ids=["the same place", "before it", "no divergence"],
)
def test_no_cause_is_named_where_none_is_shown(errors, told):
    made = of_layers(GUILTY, errors)
    assert list(relations(made)) == told
    assert ("Operations of layer 1 of the candidate" in shown(made)) is bool(told)


def test_a_later_pass_comes_after():
    made = of_layers({(1, "blk.0.q"): 8.0}, LATER)
    (text,) = relations(made)
    assert text.startswith("layer 0, op q (pass 1, decode) of the candidate comes after the first divergence")


def test_a_clean_receipt_has_no_locations():
    assert not list(relations(of_layers(None, LATER)))


def test_what_no_later_pass_reads_is_no_cause_of_a_later_token():
    audit = samples.audits(samples.audit_result(GUILTY, plan=samples.GREEDY_PLAN), plan=samples.GREEDY_PLAN)
    made = samples.greedy_receipt(differs_at=1, held=audit)
    (text,) = relations(made)
    assert text.startswith("layer 1, op ffn_act (pass 0, prefill) of the candidate is wrong given its own inputs")
    assert text.endswith("whether it explains it was not tried")
    assert "Operations of layer 1 of the candidate" in shown(made)
