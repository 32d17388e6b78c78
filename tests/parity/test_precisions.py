"""A sample of the zoo of precisions: engines of other precisions, healthy and with a fault in one layer."""

from __future__ import annotations

import pytest

from tests.zoo.precisions import ENGINES, FAULTS, Case, cases, outcomes

EVERY = 100
SAMPLE: list[Case] = [
    ("float activations", False, None),
    ("weights dequantised to bfloat16", False, None),
    ("tensors stored in binary16", False, FAULTS[0]),
    *list(cases())[5::EVERY],
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case[0]}-{case[1]}-{case[2] and case[2].name}")
def test_a_healthy_engine_is_no_defect_and_a_fault_is_found_in_its_place(shipped_model, case):
    (found,) = outcomes(shipped_model, [case])
    assert found.good, found


def test_twenty_faults_are_tried_in_every_engine():
    assert len(FAULTS) == len({fault.name for fault in FAULTS}) == 20
    for name in ENGINES:
        assert {fault for engine, states, fault in cases() if engine == name and not states} == {None, *FAULTS}
