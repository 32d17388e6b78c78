"""Within one judgement the same object is read once; what was changed in between judgements is read anew."""

from __future__ import annotations

from crossval import registry
from crossval.receipts.once import judgement, once
from tests.support import receipt_samples as samples

READ: list[list[int]] = []


@once
def total(values: list[int]) -> int:
    READ.append(values)
    return sum(values)


def test_once_within_a_judgement_and_always_outside() -> None:
    READ.clear()
    values, equal = [1, 2], [1, 2]
    with judgement():
        assert (total(values), total(values), total(equal)) == (3, 3, 3)
        assert len(READ) == 2, "known by what it is, not by its value"
    values.append(3)
    assert (total(values), total(values)) == (6, 6)
    assert len(READ) == 4
    with judgement():
        assert total(values) == 6


def test_a_receipt_changed_in_place_is_judged_anew() -> None:
    made = samples.layers_receipt()
    before = registry.judge(made)
    made["results"]["rows"][0] = {**made["results"]["rows"][0], "n_elements": 7}
    assert registry.judge(made) != before
    assert {one.name for one in registry.judge(made) if not one.passed} >= {"digest", "structure"}
