"""Both tokenizers are ours here; the second is altered in one way, which has to be found."""

import dataclasses

import pytest

from bitnet_py.special_tokens import TokenKind
from crossval.api.request import silent
from crossval.bitnet_cpp.vocabulary import Refused
from crossval.passes import EngineIdentity
from crossval.receipts.kind import build
from crossval.receipts.party import Compute, Party
from crossval.registry import judge, show_receipt
from crossval.tokens.compare import MODES, compare
from crossval.tokens.corpus import Corpus, Text
from crossval.tokens.party import OurTokenizer
from crossval.tokens.receipt import TOKENS, agree
from tests.support import receipt_samples, vocabularies

CORPUS = Corpus(
    "small.txt",
    (
        *(Text("words", text) for text in (b"a b", b"the old river", b"don't 123")),
        *(Text("bytes", text) for text in (b"\xff", "é中".encode())),
    ),
)


class Altered(OurTokenizer):
    """Another tokenizer: ``ids`` and ``spelled`` change what it gives."""

    def __init__(self, tokenizer, ids=lambda text, ids: ids, spelled=lambda token, piece: piece):
        super().__init__(tokenizer, EngineIdentity("bitnet.cpp", library_digest="2" * 64))
        self.change, self.spelled = ids, spelled

    def tokenize_each(self, texts, **options):
        return [
            self.change(text, ids)
            for text, ids in zip(texts, super().tokenize_each(texts, **options), strict=True)
        ]

    def pieces(self):
        return [self.spelled(token, piece) for token, piece in enumerate(super().pieces())]


def compared(kind="llama-bpe", corpus=CORPUS, **changes):
    tokenizer = vocabularies.tokenizer_of(kind)
    parties = {"candidate": OurTokenizer.of(tokenizer), "reference": Altered(tokenizer, **changes)}
    result = compare(parties, tokenizer, corpus, silent)
    size = tokenizer.vocab_size
    shape = {**receipt_samples.SHAPE, "vocab_size": size}
    facts = receipt_samples.context(
        model={**receipt_samples.MODEL, "shape": shape},
        tokenizer={**receipt_samples.TOKENIZER, "vocab_size": size, "engines_agree": agree(result)},
        text=None,
        template=None,
        token_ids=(),
        candidate=Party("live", parties["candidate"].identity),
        reference=Party("live", parties["reference"].identity),
        compute=Compute("none"),
        settings={},
    )
    return result, build(TOKENS, result, facts)


def failures(receipt):
    return [check.name for check in judge(receipt) if not check.passed]


def test_equal_tokenizers_pass():
    result, receipt = compared()
    assert receipt["verdict"] == "pass"
    assert failures(receipt) == []
    assert result.first_difference is None
    assert receipt["tokenizer"]["engines_agree"] is True
    assert {row.category for row in result.rows} == {"words", "bytes", "own specials"}
    by_both = sum(row.n_refused for row in result.rows if row.category == "bytes")
    assert by_both == len(MODES)
    assert receipt["parity"]["exact_match_rate"] == 1.0


def test_the_first_difference_is_shown_as_pieces(capsys):
    def last_two_swapped(text, ids):
        return [*ids[:-2], ids[-1], ids[-2]] if text == b"the old river" else ids

    result, receipt = compared(ids=last_two_swapped)
    first = result.first_difference
    assert (first.mode, first.category, first.index) == ("prompt", "words", 1)
    assert bytes.fromhex(first.text) == b"the old river"
    ours, theirs = first.seen["candidate"], first.seen["reference"]
    at = first.at - first.start
    assert (ours.pieces[at], theirs.pieces[at]) == (theirs.pieces[at + 1], ours.pieces[at + 1])
    assert receipt["verdict"] == "fail"
    assert failures(receipt) == ["verdict"]
    assert receipt["tokenizer"]["engines_agree"] is False
    row = result.rows[0]
    assert (row.n_equal, row.n_different, row.n_lost["reference"], row.n_lost["candidate"]) == (2, 1, 1, 0)
    from crossval.console import console

    show_receipt(console(), receipt)
    shown = capsys.readouterr().out
    assert "first difference: text 1 (words), as prompt" in shown
    assert repr(ours.pieces[at]) in shown
    assert "FAIL" in shown


@pytest.mark.parametrize(
    ("side", "verdict"), [("reference", "incomplete"), ("candidate", "fail")], ids=["reference", "candidate"]
)
def test_a_text_that_one_side_refuses(side, verdict):
    def refuse(text, ids):
        return Refused("its process ends: SIGSEGV") if text == b"don't 123" else ids

    result, receipt = compared(ids=refuse)
    if side == "candidate":
        rows = [_swapped(row) for row in result.rows]
        seen = {
            "candidate": result.first_difference.seen["reference"],
            "reference": result.first_difference.seen["candidate"],
        }
        swapped = dataclasses.replace(
            result, rows=tuple(rows), first_difference=dataclasses.replace(result.first_difference, seen=seen)
        )
        receipt = build(TOKENS, swapped, _facts_of(receipt))
    assert receipt["verdict"] == verdict
    assert failures(receipt) == ["verdict"]
    assert receipt["results"]["total"]["n_refused_by"][side] == len(MODES)
    assert result.first_difference.seen["reference"].refused == "its process ends: SIGSEGV"


def _swapped(row):
    def other(data):
        return {"candidate": data["reference"], "reference": data["candidate"]}

    return dataclasses.replace(
        row, n_refused_by=other(row.n_refused_by), digests=other(row.digests), n_lost=other(row.n_lost)
    )


def _facts_of(receipt):
    return receipt_samples.context(
        model=receipt["model"], tokenizer=receipt["tokenizer"], text=None, template=None, token_ids=(),
        candidate=Party.from_json(receipt["candidate"]), reference=Party.from_json(receipt["reference"]),
        compute=Compute("none"), settings={},
    )  # fmt: skip


def test_another_piece_fails_and_loses_texts():
    token = vocabularies.metadata("llama-bpe")["tokenizer.ggml.tokens"].index("a")
    result, receipt = compared(spelled=lambda i, piece: b"A" if i == token else piece)
    assert result.n_pieces - result.n_pieces_equal == 1
    assert receipt["verdict"] == "fail"
    assert sum(row.n_lost["reference"] for row in result.rows) > 0
    assert sum(row.n_lost["candidate"] for row in result.rows) == 0


def test_nothing_compared_is_no_pass():
    corpus = Corpus("bad.txt", (Text("bytes", b"\xff"),))
    result, receipt = compared("qwen2", corpus, ids=lambda text, ids: Refused("no"))
    assert receipt["verdict"] in ("fail", "incomplete")
    assert "verdict" in failures(receipt)
    only = dataclasses.replace(
        result, rows=tuple(row for row in result.rows if row.category == "bytes"), n_texts=1
    )
    only = dataclasses.replace(only, first_difference=None)
    receipt = build(
        TOKENS,
        only,
        dataclasses.replace(_facts_of(receipt), tokenizer={**receipt["tokenizer"], "engines_agree": None}),
    )
    assert receipt["verdict"] == "incomplete"
    assert receipt["parity"]["exact_match_rate"] is None
    assert {"verdict", "compared", "exact match"} <= set(failures(receipt))


@pytest.mark.parametrize("kind", ["sentencepiece", "gemma-like", "sentencepiece, both ends"])
def test_pieces_of_sentencepiece_give_back_what_was_read(kind):
    texts = ("a▁ b\n\nc", "<s>x</s> y<mask>z", "  two  spaces ", "é中😀\0", "the old river")
    corpus = Corpus("x.txt", (*(Text("words", text.encode()) for text in texts), Text("bytes", b"\x80a\xe4b")))
    result, _ = compared(kind, corpus)
    assert all(row.ok for row in result.rows), result.rows


def test_a_token_without_a_piece_is_no_loss():
    tokenizer = vocabularies.tokenizer_of("gemma-like")
    unused = [i for i, kind in enumerate(tokenizer.vocabulary.kinds) if kind == TokenKind.UNUSED]
    assert tokenizer.token_bytes(unused[0], skip_special=False) == b""


class TestForged:
    """A receipt that says what its rows, or the corpus, do not say."""

    @pytest.fixture(scope="class")
    @staticmethod
    def different():
        return compared(ids=lambda text, ids: [*ids, ids[-1]] if text == b"a b" else ids)[1]

    @pytest.mark.parametrize(
        ("path", "value", "check"),
        [
            (("results", "rows", 0, "n_equal"), 3, "row status"),
            (("results", "rows", 0, "category"), "other", "structure"),
            (("results", "rows", 1, "digests", "candidate"), "0" * 64, "row status"),
            (("results", "rows", 0, "n_lost", "reference"), 9, "row status"),
            (("results", "rows", 2, "n_refused_by", "candidate"), 1, "row status"),
            (("results", "first_difference"), None, "first difference"),
            (("results", "first_difference", "at"), 0, "first difference"),
            (("results", "first_difference", "mode"), "plain", "first difference"),
            (("results", "first_difference", "seen", "candidate", "ids", 0), 10**6, "first difference"),
            (("results", "first_difference", "seen", "candidate", "n_ids"), 1, "first difference"),
            (("results", "first_difference", "seen", "candidate", "refused"), "x", "first difference"),
            (("results", "pieces", "n"), 7, "structure"),
            (("results", "total", "n_equal"), 7, "summary"),
            (("tokenizer", "engines_agree"), True, "structure"),
            (("thresholds", "modes"), ["prompt"], "thresholds"),
            (("compute", "path"), "library", "compute path"),
            (("verdict",), "pass", "summary"),
        ],
    )
    def test_is_caught(self, different, path, value, check):
        assert check in failures(receipt_samples.forge(different, *path, value))

    def test_rows_of_the_shipped_corpus_are_checked_against_it(self, different):
        named = receipt_samples.forge(different, "results", "corpus", "name", "shipped")
        assert "structure" in failures(named)
