"""Two correct engines of different arithmetic: what is said of them, and where they first differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crossval.examine import arithmetics
from crossval.examine.advice import advice_of
from crossval.passes import Numerics
from crossval.receipts.file import Receipt
from crossval.receipts.party import Party
from tests.support import receipt_samples as samples
from tests.unit.examine.test_triage import told

MARCH, MAIN = Numerics(8, False), Numerics(8, False, generation="main")
FIRST = (0, "blk.0.l_out")


def made(candidate: Numerics, reference: Numerics, errors: Any = None) -> Receipt:
    ours, theirs = (
        Party("live", samples.with_numerics(one, numerics))
        for one, numerics in ((samples.OURS, candidate), (samples.THEIRS, reference))
    )
    return samples.build(
        samples.layers_result(errors, policy="independent"),
        samples.context(candidate=ours, reference=theirs),
        None,
    )


def at(tap: str, ours: Numerics, theirs: Numerics, after: str | None, index: int = 0) -> str | None:
    place = {"tap": tap, "after": after, "pass_index": index}
    return arithmetics.at(made(ours, theirs), place)


def test_equal_or_unknown_arithmetic_is_not_mentioned():
    assert arithmetics.stated(made(MAIN, MAIN)) is None
    assert arithmetics.stated(made(Numerics(), MAIN)) is None
    assert at("blk.0.q", Numerics(), MAIN, "blk.0.attn_norm") is None


def test_both_are_named():
    assert arithmetics.stated(made(MARCH, MAIN)) == ("candidate: march, 8 lanes; reference: main, 8 lanes")


@pytest.mark.parametrize(
    ("tap", "after", "index", "theirs", "words"),
    [
        ("blk.0.q", "blk.0.attn_norm", 0, MAIN, "halves to even"),
        ("blk.0.l_out", "inp_embd", 0, MAIN, "at blk.0.q, quantiser and rescale differ"),
        ("blk.0.kqv_out", "blk.0.kq_soft_max", 0, MAIN, "candidate v in F16; reference weights and v in F16"),
        ("blk.0.kqv_out", "blk.0.kq_soft_max", 1, MAIN, None),
        ("blk.0.attn_norm", "inp_embd", 0, MAIN, None),
        ("blk.0.kq", "blk.0.k_rope", 0, Numerics(16, False), "lanes of sums and exponential differ: candidate 8"),
        (
            "blk.0.kqv_out", "blk.0.kq_soft_max", 0, replace(MAIN, flash_attention=True),
            "reference v in F16, sums in F16 key by key",
        ),
        ("blk.0.q", "blk.0.attn_norm", 0, Numerics(8, True), "product and rounding in one step"),
    ],
)  # fmt: skip
def test_why_bits_differ_at_a_place(tap, after, index, theirs, words):
    found = at(tap, MARCH, theirs, after, index)
    assert found is None if words is None else words in str(found)


def test_a_difference_of_two_correct_engines_is_put_down_to_their_arithmetic():
    receipt = made(MARCH, MAIN, {FIRST: 0.5})
    assert receipt["verdict"] == "divergence"
    advice = advice_of(receipt)
    assert (
        "They state different arithmetic (candidate: march, 8 lanes; reference: main, 8 lanes)" in advice.meaning
    )
    assert "bitnet_py takes over what the other states" in advice.next_step
    said = told(receipt)
    assert "bits need not be equal: at blk.0.q, quantiser and rescale differ" in said["arithmetic"]
    assert "tokens, positions, KV cache" in advice_of(made(MAIN, MAIN, {FIRST: 0.5})).next_step


def test_agreement_within_bounds_says_why_bits_differ():
    receipt = made(MARCH, MAIN, {FIRST: 1e-5})
    assert receipt["verdict"] == "parity"
    assert told(receipt)["arithmetic"].startswith("candidate: march, 8 lanes; reference: main, 8 lanes")


def test_what_sums_in_binary16_leave_open_is_said():
    narrow = replace(MAIN, binary16_sums=True)
    assert "The reference adds products in binary16" in advice_of(made(MAIN, narrow)).meaning
    assert "binary16" not in advice_of(made(MAIN, MAIN)).meaning
