"""Suspects are ranked by measured faults, and the measured file is what the page says of it."""

from __future__ import annotations

from crossval.texts.evidence import Evidence, Fault, Share, Signature, evidence, parse, to_json
from tests.zoo.texts import HELD_OUT, PROMPTS, broken
from tests.zoo.texts_table import MARKS, PAGE, tables

LOOP, LATER = Signature("ends in a loop", "at once"), Signature("ends in a loop", "later")
EMPTY, RIGHT = Signature("empty", "stops early"), Signature("readable", "none")


def fault(name: str, family: str, *seen: Signature, held_out: Signature = RIGHT) -> Fault:
    return Fault(name, family, "", dict.fromkeys(seen, 1), {held_out: 2})


MADE = Evidence(
    (
        fault("a1", "a", LOOP, held_out=LOOP),
        fault("a2", "a", LATER, EMPTY, held_out=EMPTY),
        fault("a3", "a", RIGHT),
        fault("b1", "b", LOOP, held_out=LATER),
        fault("c1", "c", LOOP),
        fault("c2", "c", LOOP),
        fault("d1", "d", RIGHT, held_out=LOOP),
        fault("e1", "e", LOOP),
        fault("e2", "e", RIGHT),
    ),
    9,
    {},
)


def ranked(signature: Signature, without: str = "") -> list[tuple[str, int, int]]:
    return [(one.family, len(one.faults), one.of) for one in MADE.suspects(signature, without)]


def test_the_class_with_most_such_faults_comes_first_and_the_larger_share_of_equals():
    assert ranked(LOOP) == [("c", 2, 2), ("b", 1, 1), ("e", 1, 2), ("a", 1, 3)]


def test_without_a_right_text_the_form_alone_counts_but_right_texts_are_no_sign():
    assert ranked(Signature("ends in a loop")) == [("c", 2, 2), ("a", 2, 3), ("b", 1, 1), ("e", 1, 2)]
    assert ranked(Signature("readable")) == []


def test_a_departure_that_no_fault_has_shown_is_ranked_by_its_looks():
    odd = Signature("empty", "goes on")
    assert ranked(odd) == []
    assert MADE.nearest(odd) == Signature("empty")
    assert MADE.nearest(LOOP) == LOOP


def test_shares_count_held_out_texts_that_are_not_right():
    assert MADE.share(right_known=True) == Share(2, 8)  # a1: not among three; a2: found; b1: not; d1: never
    assert MADE.share(right_known=False) == Share(6, 8)
    assert MADE.share(right_known=True, unseen_faults=True) == Share(0, 8)
    assert MADE.share(right_known=True, like=EMPTY) == Share(2, 2)
    assert MADE.share(right_known=True, blind=True) == Share(4, 8)


def test_what_is_silent():
    assert [one.name for one in MADE.faults if one.silent] == ["a3", "d1", "e2"]


def test_evidence_survives_its_file():
    again = parse(to_json(MADE.faults, MADE.n_engines, MADE.passes))
    assert again == MADE


def test_the_measured_file_has_every_fault_engine_and_text():
    measured, engines = evidence(), list(broken())
    assert {one.name: one.family for one in measured.faults} == {one.fault: one.family for one in engines}
    assert measured.n_engines == len(engines)
    assert sum(sum(one.seen.values()) for one in measured.faults) == len(engines) * len(PROMPTS)
    assert sum(sum(one.held_out.values()) for one in measured.faults) == len(engines) * len(HELD_OUT)
    assert not set(PROMPTS) & set(HELD_OUT)


def test_the_page_shows_what_the_file_holds():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(MARKS[0])[2].partition(MARKS[1])[0] == tables(evidence())


def test_on_other_prompts_the_ranking_beats_not_looking_unless_the_fault_was_never_seen():
    blind = evidence().share(right_known=True, blind=True)
    for right_known in (False, True):
        share = evidence().share(right_known=right_known)
        assert share.of == blind.of > 2000
        assert share.found > 1.4 * blind.found
        assert evidence().share(right_known=right_known, unseen_faults=True).found < share.found
