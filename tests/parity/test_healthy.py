"""Healthy engines raise no alarm; ``python -m tests.healthy`` makes 500 runs."""

from __future__ import annotations

import pytest

from tests import healthy
from tests.families import FAMILIES

N_RUNS = 12


def check(live: bool) -> None:
    seen = list(healthy.run(N_RUNS, live=live))
    assert [verdict for _, verdict in seen] == ["parity"] * N_RUNS, seen
    situations = [situation for situation, _ in seen]
    assert len({situation.model for situation in situations}) >= 4
    assert len({situation.n_tokens for situation in situations}) >= 4
    assert {situation.kernel for situation in situations} == set(FAMILIES)


def test_no_false_alarm_against_the_engine_in_another_configuration() -> None:
    check(live=False)


@pytest.mark.live
def test_no_false_alarm_against_bitnet_cpp(bitnet_cpp_library) -> None:
    check(live=True)
