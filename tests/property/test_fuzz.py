"""Every fuzzed reader on its seeds and on what once broke it; and what the fuzzer must notice, it notices."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_py.errors import BitnetError
from crossval.errors import BadInputError
from tests.fuzz import run_one as run_one_module
from tests.fuzz.crashers import CRASHERS
from tests.fuzz.mutate import mutated
from tests.fuzz.run_one import MAX_BYTES, Target, Unbounded, run_one
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


def broken(read: Callable[[bytes, Path], None]) -> Target:
    return Target(read, (BitnetError, BadInputError), ())


def fails(data: bytes, scratch: Path) -> None:
    raise KeyError(data)


class SaysTwoLines(BadInputError):
    def __str__(self) -> str:
        return "a\nb"


def says_two_lines(data: bytes, scratch: Path) -> None:
    raise SaysTwoLines


def takes_long(data: bytes, scratch: Path) -> None:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("read", "expected", "match"),
    [
        (fails, KeyError, "abc"),
        (says_two_lines, Unbounded, "SaysTwoLines of 2 lines"),
        (takes_long, Unbounded, r"0\.\d s for 3 bytes"),
    ],
)
def test_what_a_reader_must_not_do_is_a_crash(
    read: Callable[[bytes, Path], None],
    expected: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if read is takes_long:
        monkeypatch.setattr("tests.fuzz.run_one.MOST_CPU_S", 0.05)
    with pytest.raises(expected, match=match):
        run_one(broken(read), b"abc", tmp_path)


def test_more_memory_than_allowed_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def takes_more_than_ever(data: bytes, scratch: Path) -> None:
        peak, now = run_one_module._peak_bytes(), int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        held.append(bytearray(b"x") * (peak - now + (64 << 20)))

    monkeypatch.setattr(run_one_module, "MOST_BYTES", 16 << 20)
    with pytest.raises(Unbounded, match="MiB for 3 bytes"):
        run_one(broken(takes_more_than_ever), b"abc", tmp_path)


def test_json_is_mutated_as_values_and_stays_json() -> None:
    choices, seed = random.Random(0), b'{"a": [1, 2.5, "x"], "b": {"c": null}}\n{"d": true}'
    made = {mutated(seed, MAX_BYTES, choices) for _ in range(200)}
    assert None not in made
    assert len(made) > 100
    for text in made:
        assert text is not None
        for line in text.decode().split("\n"):
            json.loads(line)
    assert mutated(b"{", MAX_BYTES, choices) is None
    assert mutated(seed, 5, choices) is None


def test_numbers_of_any_size_are_changed() -> None:
    choices = random.Random(3)
    made = {mutated(b"[%d, 1e308, 3]" % 10**400, MAX_BYTES, choices) for _ in range(200)}
    assert len(made) > 50
