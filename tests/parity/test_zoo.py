"""The zoo: every fault shows first where the catalogue says, and the harness finds it there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.extra import sampled
from tests.support.families import FAMILIES as KERNELS
from tests.zoo import models
from tests.zoo.build import ROOT
from tests.zoo.catalogue import CASES, FAULTS, OF, ON
from tests.zoo.fault import BOTH, FAMILIES, EngineFault
from tests.zoo.faults import bitnet, llama
from tests.zoo.names import OPEN, RIGHT, patterns
from tests.zoo.outcome import Outcome, outcomes
from tests.zoo.recording import first_difference, record
from tests.zoo.world import World, is_about_tokens, token_ids

FAMILY_NUMBERS = range(1, len(FAMILIES) + 1)
N_CASES = Counter(case.fault.family for case in CASES)
NAMED = {next(fault.cases()).id for fault in FAULTS}
"""Cases that are diagnosed here: one of every fault."""
AUDITED = [case for number, case in enumerate(CASES) if case.id in NAMED or number % 6 == 0]
"""Cases that are tried here. ``python -m tests.zoo`` tries, and diagnoses, every fault in every place."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("zoo"))


def test_names_are_given_to_faults_that_exist():
    assert set(RIGHT) <= {fault.name for fault in FAULTS}
    assert set(RIGHT) >= OPEN


def test_documentation_lists_every_fault():
    text = (ROOT / "docs" / "zoo.md").read_text()
    missing = [fault.name for fault in FAULTS if f"| `{fault.name}` |" not in text]
    assert missing == [], "renew it: python -m tests.zoo > docs/zoo.md"


def test_catalogue_covers_every_family_in_several_places():
    assert len(FAULTS) >= 60
    assert {fault.family for fault in FAULTS} == set(FAMILY_NUMBERS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({case.id for case in CASES}) == len(CASES)
    for fault in FAULTS:
        if isinstance(fault, EngineFault) and fault.passes == BOTH:
            assert {case.only for case in fault.cases()} == {None, "prefill", "decode"}
        if len(fault.layers) > 1:
            assert {case.layer for case in fault.cases()} >= set(fault.layers)


def test_faulty_build_with_no_fault_selected_gives_the_real_bits(world):
    with world.engine_faults():
        for base in models.BASES:
            assert first_difference(world.healthy(base), record(world.model(base))) is None, base


@pytest.mark.parametrize("kernel", sampled(KERNELS[::-1], 2))
def test_a_fault_is_reached_with_every_kernel_family_and_gives_the_same_bits(world, kernel):
    """So the audit's result for one family's numbers holds for all of them."""
    cases = [case for case in CASES if case.fault.how == "c" and case.id in NAMED]
    assert {case.fault.name for case in cases} == {fault.name for fault in FAULTS if fault.how == "c"}
    with world.engine_faults():
        for case in cases:
            faulty = world.faulty(case, kernel)
            assert faulty.identity.settings["kernel"] == kernel
            shown = first_difference(world.healthy(case.fault.base), faulty)
            assert shown is not None, f"{case.id} is never reached"
            assert (shown.tap, shown.pass_kind) == (case.tap, case.pass_kind), case.id
            assert first_difference(world.faulty(case), faulty) is None, case.id


@pytest.mark.parametrize("base", models.BASES)
def test_audit_of_the_healthy_engine_is_clean(world, base):
    assert world.healthy_audit(base).verdict == "clean"


@pytest.mark.parametrize(("arch", "right"), [("llama", llama.RIGHT), ("bitnet", bitnet.RIGHT)])
def test_what_an_architecture_has_beyond_others_is_found_and_named(world, arch, right):
    """``python -m tests.zoo --architectures`` tries every other fault on such a model, too."""
    cases = [next(fault.cases()) for fault in OF[arch]]
    assert set(right) <= {fault.name for fault in ON[arch]}
    results = list(outcomes(world, FAMILY_NUMBERS, cases=cases))
    assert len(results) == len(OF[arch])
    assert without(results, lambda outcome: outcome.in_place and outcome.right_side and outcome.right_op) == []
    assert without(results, lambda outcome: outcome.naming in ("right", "nameless")) == []


def without(results: list[Outcome], good: Callable[[Outcome], bool]) -> list[str]:
    return [f"{outcome.case.id}: {outcome}" for outcome in results if not good(outcome)]


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILY_NUMBERS, key=N_CASES.__getitem__, reverse=True))
def test_family_is_found_on_the_right_side_in_the_right_op(world, family):
    results = list(outcomes(world, {family}, lambda case: case.id in NAMED, AUDITED))
    assert results
    assert without(results, lambda outcome: outcome.in_place) == []
    assert without(results, lambda outcome: outcome.detected) == []
    assert without(results, lambda outcome: outcome.right_side) == []
    assert without(results, lambda outcome: outcome.right_op) == []
    assert without(results, lambda outcome: outcome.naming != "wrong") == []
    assert without(results, lambda outcome: not outcome.acquitted) == []
    to_name = [o for o in results if o.case.id in NAMED and patterns(o.case) and o.case.fault.name not in OPEN]
    assert without(to_name, lambda outcome: outcome.naming == "right") == []


@pytest.mark.parametrize("case", [case for case in CASES if is_about_tokens(case)], ids=lambda case: case.id)
def test_token_faults_change_the_tokens(world, case):
    assert token_ids(world.damaged(case)) != token_ids(world.model(case.fault.base))
