"""Healthy engines raise no alarm; ``python -m tests.healthy`` makes 500 runs."""

from __future__ import annotations

import pytest

from bitnet_py._native import kernel_families
from tests import healthy

N_RUNS = 12


def check(live: bool) -> None:
    seen = list(healthy.run(N_RUNS, live=live))
    assert [verdict for _, verdict in seen] == ["parity"] * N_RUNS, seen
    situations = [situation for situation, _ in seen]
    assert len({situation.model for situation in situations}) >= 4
    assert len({situation.n_tokens for situation in situations}) >= 4
    assert {situation.kernel for situation in situations} == {f.name for f in kernel_families() if f.available}


def test_no_false_alarm_against_the_engine_in_another_configuration() -> None:
    check(live=False)


@pytest.mark.live
def test_no_false_alarm_against_bitnet_cpp(bitnet_cpp_library) -> None:
    check(live=True)
