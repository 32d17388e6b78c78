"""A sample of the zoo of Hugging Face's model: ``python -m tests.zoo --transformers`` tries all of it."""

from __future__ import annotations

import pytest

from tests.support.torch_models import need

need("torch", "transformers")

from tests.zoo.transformers_model import CASES, ENGINES, FAULTS, Case, outcomes  # noqa: E402

HEALTHY = ("transformers:f16", None)
SAMPLE: list[Case] = [HEALTHY, *CASES[4::19]]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case[0]}-{case[1] and case[1].name}")
def test_a_healthy_model_is_no_defect_and_a_fault_is_found_in_its_place(shipped_model, case):
    (found,) = outcomes(shipped_model, [case])
    assert found.good, found


def test_twenty_faults_are_tried_in_every_format():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert {engine for engine, _ in SAMPLE} == set(ENGINES)
    assert all(case in CASES for case in SAMPLE)
