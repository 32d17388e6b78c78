"""Every fuzzed reader on its seeds and on what once broke it; and what the fuzzer must notice, it notices."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.crashers import CRASHERS
from tests.fuzz.mutate import mutated
from tests.fuzz.run_one import MAX_BYTES, run_one
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS


def test_every_target_has_seeds_and_every_crasher_a_target() -> None:
    assert set(SEEDS) == set(TARGETS)
    assert set(CRASHERS) <= set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_answered_and_mutants_answered_or_refused(name: str, tmp_path: Path) -> None:
    target, choices = TARGETS[name], random.Random(name)
    for data in SEEDS[name]():
        assert 0 < len(data) <= MAX_BYTES
        run_one(target, data, tmp_path)
        run_one(target, data[: len(data) // 2], tmp_path)
        made = mutated(data, MAX_BYTES, choices) if target.json else None
        run_one(target, made if made is not None else data.replace(b"1", b"\xff", 1), tmp_path)


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, found in CRASHERS.items() for what in found])
def test_what_once_broke_a_reader_is_answered_or_refused(name: str, what: str, tmp_path: Path) -> None:
    run_one(TARGETS[name], CRASHERS[name][what], tmp_path)
