"""What a text looks like, and where it leaves the right one."""

from __future__ import annotations

import pytest

from crossval.texts.signature import Right, departure_of, form_of, starts_with

FORMS = [
    ("", "empty"),
    (" \n\t ", "empty"),
    ("GGGGGGGGGG", "one piece repeated"),
    (" the the the the", "one piece repeated"),
    ("no.no.no.no.no.", "one piece repeated"),
    ("!!!!!!!!", "exclamation marks"),
    ("Paris!!!!!!!!", "exclamation marks"),
    ("Stop!!!", "readable and short"),
    ("Paris is aaaaaaaaaaaaa", "ends in one piece repeated"),
    ("It is Paris in May in May in May", "ends in a loop"),
    ("It is in May, in May or so.", "readable"),
    ("Paris.", "readable and short"),
    ("The capital of France has always been Paris.", "readable"),
    ("Thecapitalofsomewhereisthere", "no spaces"),
    ("ĠParis.Ċ", "pieces of the vocabulary"),
    ("▁Paris", "pieces of the vocabulary"),
    ("Paris<0x0A>", "pieces of the vocabulary"),
    ("Paris.<|eot_id|>", "special tokens"),
    ("<s> Paris", "special tokens"),
    ("a < b and b > c", "readable"),
    ("caf\ufffd", "broken characters"),
    ("cafÃ©", "broken characters"),
    ("itâ€™s", "broken characters"),
    ("a\x00b", "broken characters"),
    ("café, 東京, 🙂", "readable and short"),
    ("Âge et château", "readable and short"),
]


@pytest.mark.parametrize(("text", "form"), FORMS)
def test_forms(text, form):
    assert form_of(text) == form


RIGHT = Right((b" ", b"Par", b"is", b"."), ended=True)
CUT = Right((b" ", b"Par", b"is"), ended=False)
DEPARTURES = [
    (" Paris.", RIGHT, ("none", 4)),
    ("Paris.\n", RIGHT, ("none", 4)),
    (" London.", RIGHT, ("at once", 1)),
    (" Pa", RIGHT, ("stops early", 1)),
    ("", RIGHT, ("stops early", 0)),
    (" Parma", RIGHT, ("later", 2)),
    (" Paris, of course", RIGHT, ("later", 3)),
    (" Paris. Paris.", RIGHT, ("goes on", 4)),
    (" Paris in spring", CUT, ("none", 3)),
    (" Par", CUT, ("stops early", 2)),
    ("Pa\ufffdis.", RIGHT, ("at once", 1)),
]


@pytest.mark.parametrize(("text", "right", "expected"), DEPARTURES)
def test_departures(text, right, expected):
    assert departure_of(text, right) == expected


def test_a_character_cut_between_tokens_is_compared_by_bytes():
    right = Right(("é".encode()[:1], "é".encode()[1:], b"t"), ended=True)
    assert departure_of("ét", right) == ("none", 3)
    assert departure_of("éa", right) == ("later", 2)


def test_a_text_is_followed_as_far_as_either_goes():
    assert starts_with(" Paris", (b" ", b"Par"))
    assert starts_with(" Par", (b" ", b"Paris", b"."))
    assert not starts_with(" Pat", (b" ", b"Paris"))
