from types import SimpleNamespace

import numpy as np
import pytest

from bitnet_py.errors import InputError, TokenizerError
from bitnet_py.special_tokens import TokenKind
from bitnet_py.synth_sentencepiece import MIN_SIZE, build_sentencepiece
from bitnet_py.tokenizer import Tokenizer

HEAD = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
HEAD_KINDS = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, *[TokenKind.BYTE] * 256]


def tokenizer_of(rows=(), generation="march", **changes):
    """A SentencePiece tokenizer with bytes and these (text, score) or (text, score, kind) tokens."""
    rows = [(*row, TokenKind.NORMAL)[:3] for row in rows]
    keys = {
        "model": "llama",
        "tokens": HEAD + [text for text, _, _ in rows],
        "scores": np.array([0.0] * len(HEAD) + [score for _, score, _ in rows], np.float32),
        "token_type": HEAD_KINDS + [kind for _, _, kind in rows],
        **changes,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return Tokenizer.from_gguf(SimpleNamespace(metadata=metadata), generation)


def pieces(tokenizer, text, **options):
    return [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode(text, add_bos=False, **options)]


LETTERS = [(letter, -100.0) for letter in "▁abc"]


class TestJoining:
    def test_the_highest_score_is_joined_first_and_equal_ones_from_the_left(self):
        rows = [*LETTERS, ("ab", -2.0), ("bc", -1.0), ("aa", -3.0), ("▁a", -3.0)]
        tokenizer = tokenizer_of(rows, add_space_prefix=False)
        assert pieces(tokenizer, "abc") == ["a", "bc"]
        assert pieces(tokenizer, "aaa") == ["aa", "a"]
        assert pieces(tokenizer, " aa") == ["▁a", "a"]

    def test_a_pair_that_was_joined_otherwise_meanwhile_is_not_joined_again(self):
        rows = [*LETTERS, ("ab", -1.0), ("bc", -3.0), ("ca", -2.0)]
        tokenizer = tokenizer_of(rows, add_space_prefix=False)
        assert pieces(tokenizer, "abca") == ["ab", "ca"]

    def test_what_is_no_token_is_spelled_in_bytes(self):
        assert pieces(tokenizer_of(LETTERS), "aé😀") == [
            *("▁", "a", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>")
        ]

    def test_words_are_joined_across_spaces_where_a_token_has_one_inside(self):
        rows = [*LETTERS, ("a▁", -1.0), ("a▁b", -2.0)]
        assert pieces(tokenizer_of(rows), "a b a") == ["▁", "a▁b", "▁", "a"]

    def test_no_scores_mean_all_equal(self):
        rows = [*LETTERS, ("bc", 0.0), ("ab", 0.0)]
        assert pieces(tokenizer_of(rows, scores=None), "abc") == ["▁", "ab", "c"]

    def test_a_single_character_stands_for_its_byte_where_there_is_no_byte_token(self):
        tokens = ["<unk>", "<s>", "</s>", "a"]
        kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.NORMAL]
        tokenizer = tokenizer_of(tokens=tokens, scores=None, token_type=kinds, add_space_prefix=False)
        assert pieces(tokenizer, "a") == ["a"]
        with pytest.raises(TokenizerError, match="no token of the vocabulary can express byte 0x62"):
            tokenizer.encode("b")


class TestBytes:
    def test_bytes_that_are_not_utf8_are_spelled(self):
        tokenizer = tokenizer_of([*LETTERS, ("ab", -1.0)])
        # A lead byte takes as many bytes as it announces, whatever they are.
        assert pieces(tokenizer, b"ab\xe4ab") == ["▁", "ab", "<0xE4>", "<0x61>", "<0x62>"]
        assert pieces(tokenizer, b"ab\x80ab") == ["▁", "ab", "<0x80>", "ab"]
        assert pieces(tokenizer, b"\xf0\x9f\x98") == ["▁", "<0xF0>", "<0x9F>", "<0x98>"]

    def test_byte_tokens_decode_to_their_bytes(self):
        tokenizer = tokenizer_of(LETTERS)
        data = "é▁ 😀\0\x80".encode() + b"\xff"
        assert tokenizer.decode_bytes(tokenizer.encode(data, add_bos=False)) == b" " + data.replace(
            "▁".encode(), b" "
        )

    def test_text_that_is_not_unicode(self):
        with pytest.raises(InputError, match="not valid Unicode"):
            tokenizer_of(LETTERS).encode("a\ud800")


class TestSpacePrefix:
    def test_a_space_is_put_before_text_at_the_beginning_and_after_special_tokens(self):
        tokenizer = tokenizer_of(LETTERS)
        assert pieces(tokenizer, "a<s>b</s></s> c") == ["▁", "a", "<s>", "▁", "b", "</s>", "</s>", "▁", "▁", "c"]
        assert tokenizer.encode("") == [1]

    def test_not_where_the_file_says_so(self):
        assert pieces(tokenizer_of(LETTERS, add_space_prefix=False), "a<s>b") == ["a", "<s>", "b"]


class TestSpecialTokens:
    ROWS = (*LETTERS, ("<c>", 0.0, TokenKind.CONTROL), ("<u>", 0.0, TokenKind.USER_DEFINED))

    def test_only_user_defined_tokens_are_recognised_in_plain_text(self):
        rows = [*self.ROWS, ("<", -100.0), (">", -100.0), ("u", -100.0)]
        tokenizer = tokenizer_of(rows, add_space_prefix=False)
        assert pieces(tokenizer, "<c><u>") == ["<c>", "<u>"]
        assert pieces(tokenizer, "<c><u>", parse_special=False) == ["<", "c", ">", "<u>"]

    def test_unused_tokens_are_made_and_decode_to_nothing(self):
        tokenizer = tokenizer_of([*LETTERS, ("ab", -1.0, TokenKind.UNUSED)], add_space_prefix=False)
        assert pieces(tokenizer, "ab") == ["ab"]
        assert tokenizer.decode(tokenizer.encode("ab"), skip_special=False) == "<s>"

    def test_bos_and_eos(self):
        assert tokenizer_of(LETTERS).encode("") == [1]
        assert tokenizer_of(LETTERS, add_bos_token=False, add_eos_token=True).encode("") == [2]
        assert tokenizer_of(LETTERS).pre is None
        assert tokenizer_of(LETTERS).vocabulary.warnings == ()

    def test_models_named_phi_3_swallow_white_space_after_special_tokens(self):
        rows = [*self.ROWS, ("\n", -100.0)]
        assert pieces(tokenizer_of(rows), "<c> \na") == ["<c>", "▁", "▁", "\n", "a"]
        metadata = {"general.name": "A Phi3 model"}
        keys = tokenizer_of(rows).vocabulary
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": list(keys.tokens)}
        metadata |= {"tokenizer.ggml.token_type": list(keys.kinds), "tokenizer.ggml.scores": list(keys.scores)}
        phi = Tokenizer.from_gguf(SimpleNamespace(metadata=metadata))
        assert pieces(phi, "<c> \na") == ["<c>", "▁", "a"]
        assert pieces(phi, "<s> a") == ["<s>", "▁", "▁", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "scores has 1 entries, expected 259, one per token"),
        ({"scores": [float("nan")] * 259}, "scores is not an array of finite numbers"),
        ({"scores": 3}, "scores is not an array of finite numbers"),
        ({"add_space_prefix": 1}, "add_space_prefix is int, expected bool"),
        ({"token_type": [TokenKind.BYTE, *HEAD_KINDS[1:]]}, "token 0 is of kind BYTE: expected <0x00>"),
        ({"bos_token_id": 259}, "bos_token_id is 259, outside the vocabulary of 259 tokens"),
    ],
)
def test_unusable_metadata(changes, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer_of(**changes)


def test_a_hundred_thousand_characters_without_a_space_take_seconds_at_most():
    vocab = build_sentencepiece(900, 0)
    rows = list(zip(vocab.tokens, vocab.scores, vocab.token_types, strict=True))[len(HEAD) :]
    tokenizer = tokenizer_of(rows)
    ids = tokenizer.encode("the" * 33_334)
    assert tokenizer.decode(ids)[-100_002:] == "the" * 33_334


def test_synthetic_vocabulary_compresses_its_own_text():
    vocab = build_sentencepiece(900, 0)
    assert len(set(vocab.tokens)) == 900 > MIN_SIZE
    rows = list(zip(vocab.tokens, vocab.scores, vocab.token_types, strict=True))[len(HEAD) :]
    assert len(tokenizer_of(rows).encode("the old river moves slowly toward the mountain")) < 20


def test_a_large_synthetic_vocabulary_ends_in_unused_tokens():
    vocab = build_sentencepiece(3000, 0)
    assert len(set(vocab.tokens)) == 3000 == len(vocab.token_types) == len(vocab.scores)
    n_unused = vocab.token_types.count(TokenKind.UNUSED)
    assert vocab.tokens[-n_unused:] == tuple(f"<unused{n}>" for n in range(n_unused))
    assert n_unused > 1000
