"""Which settings are tried, and which of them is chosen."""

from __future__ import annotations

import pytest

from crossval.bench.search import Search, Setting, Tried, settings_to_try, thread_counts


@pytest.mark.parametrize(
    ("n", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_numbers_of_threads(n: int, counts: list[int]) -> None:
    assert thread_counts(n) == counts


def test_several_threads_are_tried_free_and_pinned() -> None:
    free, pinned = Setting(2), Setting(2, (4, 6))
    assert settings_to_try([4, 6], None, can_place=True) == [Setting(1), free, pinned]
    assert settings_to_try([4, 6], None, can_place=False) == [Setting(1), free]
    assert settings_to_try([4, 6, 5], 2, can_place=True) == [Setting(1), free, pinned]
    assert settings_to_try([4, 6], 1, can_place=True) == [Setting(1)]
    assert settings_to_try([4, 6], 3, can_place=True) == [Setting(1), Setting(3)]  # more than there are cores


def search(n_threads: int | None = None, **raw: tuple[tuple[float, ...], ...]) -> Search:
    settings = (Setting(1), Setting(2), Setting(2, (0, 1)))
    tried = [Tried(one, {name: values[i] for name, values in raw.items()}) for i, one in enumerate(settings)]
    return Search(tuple(tried), n_threads)


def test_each_measure_has_its_own_fastest_setting() -> None:
    made = search(
        prefill=((3.0, 3.1, 3.2), (2.0, 9.0, 8.0), (2.5, 2.4, 2.6)),  # free threads are fast only sometimes
        decode=((1.0, 1.1, 1.0), (1.2, 1.3, 1.2), (1.5, 1.1, 1.4)),
        greedy=((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        first_token=((0.5,), (0.4,), ()),
    )
    assert made.chosen("prefill") == Setting(2, (0, 1))
    assert made.chosen("decode") == Setting(1)
    assert made.chosen("greedy") == Setting(1)  # no gain, no second thread
    assert made.chosen("first_token") == Setting(2)
    assert made.one_thread("decode") == (1.0, 1.1, 1.0)


def test_a_number_that_was_asked_for_is_kept() -> None:
    made = search(2, decode=((1.0,), (1.2,), (1.1,)))
    assert made.chosen("decode") == Setting(2, (0, 1))
    assert made.one_thread("decode") == (1.0,)
    assert search(4, decode=((1.0,), (1.2,), (1.1,))).chosen("decode") is None


def test_what_was_not_tried_is_not_chosen() -> None:
    assert search(decode=((), (), ())).chosen("decode") is None
    assert search().chosen("decode") is None
