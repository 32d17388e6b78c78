"""The zoo: every fault changes the engine exactly where the catalogue says, and the audit finds it there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.zoo import models
from tests.zoo.catalogue import CASES, FAULTS
from tests.zoo.fault import BOTH, FAMILIES, Case, EngineFault
from tests.zoo.recording import first_difference, record
from tests.zoo.world import World, is_about_tokens, token_ids


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("zoo"))


def cases(how: str) -> Iterator[Case]:
    return (case for case in CASES if case.fault.how == how and not is_about_tokens(case))


def test_catalogue_covers_every_family_in_several_places():
    assert len(FAULTS) >= 60
    assert {fault.family for fault in FAULTS} == set(range(1, len(FAMILIES) + 1))
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({case.id for case in CASES}) == len(CASES)
    for fault in FAULTS:
        if isinstance(fault, EngineFault) and fault.passes == BOTH:
            assert {case.only for case in fault.cases()} == {None, "prefill", "decode"}
        if len(fault.layers) > 1:
            assert {case.layer for case in fault.cases()} >= set(fault.layers)


def wrong_places(world: World, how: str) -> dict[str, str]:
    """Compare every case with the healthy engine, bit by bit, tap by tap; return those that show elsewhere."""
    wrong = {}
    for case in cases(how):
        found = first_difference(world.healthy(case.fault.base), world.faulty(case))
        if found is None or (found.tap, found.pass_kind) != (case.tap, case.pass_kind):
            wrong[case.id] = f"first difference: {found}"
    return wrong


def test_engine_faults_first_show_where_the_catalogue_says(world):
    with world.engine_faults():
        assert wrong_places(world, "c") == {}


def test_faulty_build_with_no_fault_selected_gives_the_real_bits(world):
    with world.engine_faults():
        for base in models.BASES:
            assert first_difference(world.healthy(base), record(world.model(base))) is None, base


def test_weight_faults_first_show_where_the_catalogue_says(world):
    assert wrong_places(world, "weights") == {}


def test_trace_faults_first_show_where_the_catalogue_says(world):
    assert wrong_places(world, "trace") == {}


@pytest.mark.parametrize("case", [case for case in CASES if is_about_tokens(case)], ids=lambda case: case.id)
def test_token_faults_change_the_tokens(world, case):
    assert token_ids(world.damaged(case)) != token_ids(world.model(case.fault.base))
