"""Healthy engines raise no alarm; ``python -m tests.healthy [--recordings | --strangers]`` makes 500 runs."""

from __future__ import annotations

import pytest

from tests import healthy
from tests.support import healthy_recordings, healthy_strangers
from tests.support.families import FAMILIES
from tests.support.recordings import RECORDINGS

N_RUNS = 12


def check(live: bool) -> None:
    seen = list(healthy.run(N_RUNS, live=live))
    assert [verdict for _, verdict in seen] == ["parity"] * N_RUNS, seen
    situations = [situation for situation, _ in seen]
    assert len({situation.model for situation in situations}) >= 4
    assert len({situation.n_tokens for situation in situations}) >= 4
    assert {situation.kernel for situation in situations} == set(FAMILIES)


@pytest.mark.long
def test_no_false_alarm_against_the_engine_in_another_configuration():
    check(live=False)


@pytest.mark.live
def test_no_false_alarm_against_bitnet_cpp(bitnet_cpp_library):
    check(live=True)


@pytest.mark.long
def test_no_false_alarm_on_what_people_record(tmp_path):
    few, cheap = 4, RECORDINGS[:4]
    short = [n for n in range(200, 300) if healthy_recordings.Situation.draw(n).n_tokens <= 17][:few]
    seen = list(healthy_recordings.run(short, tmp_path, recordings=cheap))
    assert len(seen) == few * len(cheap)
    assert [one for one in seen if one[2].exit_code not in (0, 3)] == []
    assert {judged.exit_code for _, kept, judged in seen if kept == "all taps"} == {0}
    rest = list(healthy_recordings.run(short[:1], tmp_path, recordings=RECORDINGS[4:]))
    assert {judged.exit_code for _, _, judged in rest} <= {0, 3}


def test_every_engine_takes_its_turn():
    drawn = [healthy_recordings.Situation.draw(number) for number in range(len(healthy_recordings.ENGINES))]
    assert [one.engine for one in drawn] == list(healthy_recordings.ENGINES)
    assert len(drawn) > 12
    assert drawn == [healthy_recordings.Situation.draw(number) for number in range(len(drawn))]


@pytest.mark.long
def test_no_false_alarm_on_strangers(tmp_path):
    engines = (healthy_strangers.THIRD, healthy_strangers.OURS, "bfloat16", "weights dequantised to binary16")
    drawn = [healthy_strangers.Situation.draw(number) for number in range(400)]
    short = [
        one for one in drawn if sum(one.pieces) <= 3 and one.left_out not in ("logits only", "every third `l_out`")
    ]
    numbers = [next(one.number for one in short if one.engine == engine) for engine in engines]
    seen = list(healthy_strangers.run(numbers, tmp_path))
    assert [one for one in seen if one[1].verdict not in one[0].allowed] == []


def test_every_stranger_takes_its_turn():
    drawn = [healthy_strangers.Situation.draw(number) for number in range(500)]
    assert [one.engine for one in drawn[: len(healthy_strangers.ENGINES)]] == list(healthy_strangers.ENGINES)
    assert {one.model for one in drawn} == {*healthy_strangers.SHAPES, *healthy_strangers.OF_TEXT}
    assert {one.left_out for one in drawn} == set(healthy_strangers.CHOICES)
    assert len({one.states for one in drawn if one.engine == "bfloat16"}) == 2
