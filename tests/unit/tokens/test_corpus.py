from crossval.tokens.corpus import LONG_BYTES, OWN, of_file, shipped, with_own

DIGEST = "9fd3f7ba42f3a01eef45bfd9f9fa7698e2ebb33394a23d6ed370bd81095f6088"
"""Changes with any text; then the goldens have to be recorded again."""


def test_it_is_the_same_everywhere_and_large():
    corpus = shipped()
    assert corpus.digest == DIGEST
    assert len(corpus.texts) >= 2000
    assert len({text.data for text in corpus.texts}) > 0.95 * len(corpus.texts)


def test_every_category_is_what_it_says():
    of = {name: [t.data for t in shipped().texts if t.category == name] for name in shipped().categories}
    utf8 = {name: all(_is_utf8(data) for data in texts) for name, texts in of.items()}
    assert [name for name, good in utf8.items() if not good] == ["invalid"]
    assert all(len(data) >= 0.95 * LONG_BYTES and b" " not in data for data in of["long"])
    assert len(of["long"]) == 6
    assert any("\u0301".encode() in data for data in of["marks"])
    assert any("\u200d".encode() in data for data in of["emoji"])
    assert any(b"\0" in data for data in of["controls"])
    assert any(b"<|eot_id|>" in data for data in of["specials"])
    assert max(len(data) for name, texts in of.items() if name != "long" for data in texts) < 2000


def _is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_texts_of_a_vocabulary_are_added_without_changing_the_digest():
    corpus = with_own(shipped(), ["<a>", "", "<b>"])
    added = [text.data for text in corpus.texts if text.category == OWN]
    assert corpus.digest == shipped().digest
    assert added[:3] == [b"<a>", b"a <a> b", b"<a><a>"]
    assert len(added) == 12


def test_lines_of_a_file():
    corpus = of_file("x.txt", b"a\n\n\xff b\n")
    assert [text.data for text in corpus.texts] == [b"a", b"\xff b"]
    assert corpus.digest != of_file("x.txt", b"a\xff b\n").digest
