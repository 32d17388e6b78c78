import base64
import hashlib
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitnet_py import unicode_ranges
from bitnet_py.errors import InputError, TokenizerError
from bitnet_py.pretokenizer import PRE_TYPES, get_pre_type
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.vocabulary import byte_alphabet

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data"
LLAMA3_RANKS = ROOT.parent / "shared" / "data" / "llama3" / "tokenizer.model"
ALPHABET = byte_alphabet()
PRES = ("llama-bpe", "default", "gpt-2")


def load(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def tokenizer_of(metadata):
    return Tokenizer.from_gguf(SimpleNamespace(metadata=metadata))


def small_metadata(pre="llama-bpe", **changes):
    """The vocabulary of the small goldens as GGUF metadata; ``changes`` replace keys, None removes one."""
    vocabulary = load("tokenizer_goldens_small.json")["vocabulary"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary["tokens"],
        "tokenizer.ggml.token_type": np.array(vocabulary["token_type"], np.int32),
        "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.bos_token_id": vocabulary["bos_token_id"],
        "tokenizer.ggml.eos_token_id": vocabulary["eos_token_id"],
    }
    for key, value in changes.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.fixture(scope="module")
def small():
    return {pre: tokenizer_of(small_metadata(pre)) for pre in PRES}


@pytest.fixture(scope="module")
def llama3():
    if not LLAMA3_RANKS.exists():
        pytest.skip("Llama 3 vocabulary missing: put its tokenizer.model at ../shared/data/llama3/tokenizer.model")
    raw = LLAMA3_RANKS.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == load("tokenizer_goldens_llama3.json")["vocabulary"]["sha256"]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}
    text = {token: "".join(map(ALPHABET.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[a], ranks[b], text[a], text[b]) for a, b in cuts if a in ranks and b in ranks)
        merges += [f"{a} {b}" for _, _, a, b in pairs]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [text[token] for token in sorted(ranks, key=ranks.__getitem__)] + special,
        "tokenizer.ggml.token_type": [TokenKind.NORMAL] * len(ranks) + [TokenKind.CONTROL] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128001,
    }
    return {pre: tokenizer_of({**metadata, "tokenizer.ggml.pre": pre}) for pre in PRES}


def assert_equal_to_goldens(tokenizers, name):
    cases = load(name)["cases"]
    differ, n_compared = [], 0
    for case in cases:
        assert set(case["ids"]) == set(PRES)
        for pre, ids in case["ids"].items():
            for parse_special in (True, False):
                expected = ids["special"] if parse_special else ids.get("plain", ids["special"])
                actual = tokenizers[pre].encode(case["text"], parse_special=parse_special)
                n_compared += 1
                if actual != expected:
                    differ.append((pre, parse_special, case["text"], expected, actual))
    assert n_compared == 6 * len(cases) > 600
    assert not differ, f"{len(differ)} of {n_compared} differ, first: {differ[0]}"


class TestEqualToBitnetCpp:
    def test_ids_of_the_small_vocabulary(self, small):
        assert_equal_to_goldens(small, "tokenizer_goldens_small.json")

    def test_ids_of_the_llama_3_vocabulary(self, llama3):
        assert_equal_to_goldens(llama3, "tokenizer_goldens_llama3.json")

    def test_tokens_that_end_generation(self, small):
        assert small["default"].eos_ids == set(load("tokenizer_goldens_small.json")["vocabulary"]["end_ids"])

    def test_llama_bpe_adds_bos_and_the_others_do_not(self, small):
        bos = small["default"].bos_id
        assert [small[pre].encode("a")[0] == bos for pre in PRES] == [True, False, False]
        assert small["llama-bpe"].encode("") == [bos]
        assert small["llama-bpe"].encode("", add_bos=False) == []

    @pytest.mark.parametrize("pre", PRES)
    def test_add_bos_key_overrides_the_pre_tokeniser(self, pre):
        for wanted in (True, False):
            tokenizer = tokenizer_of(small_metadata(pre, add_bos_token=wanted))
            assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is wanted

    def test_add_eos_key(self):
        tokenizer = tokenizer_of(small_metadata(add_eos_token=True))
        eos = tokenizer.vocabulary.eos_id
        assert tokenizer.encode("a")[-1] == eos
        assert eos not in tokenizer.encode("a", add_bos=False)

    def test_absent_pre_tokeniser_is_default(self):
        for absent in (None, ""):
            assert tokenizer_of(small_metadata(absent)).pre == "default"
        assert get_pre_type("llama3") is get_pre_type("llama-v3") is PRE_TYPES["march"]["llama-bpe"]

    @pytest.mark.parametrize(("role", "wanted"), [("bos", [11, 64]), ("eos", [64, 11])])
    def test_bos_and_eos_that_the_file_does_not_name_are_token_11(self, role, wanted):
        keys = {"bos": {"bos_token_id": None}, "eos": {"eos_token_id": None, "add_bos_token": False}}[role]
        tokenizer = tokenizer_of(small_metadata(**keys, add_eos_token=role == "eos"))
        assert tokenizer.encode("a") == wanted
        assert f"{role}_token_id is missing: token 11" in tokenizer.vocabulary.warnings[0]

    def test_there_is_no_token_11(self):
        metadata = small_metadata(merges=["a b"], token_type=None, bos_token_id=None, eos_token_id=0)
        metadata["tokenizer.ggml.tokens"] = ["a", "b", "ab"]
        with pytest.raises(TokenizerError, match="bos_token_id is missing, but the tokenizer adds that token"):
            tokenizer_of(metadata)

    def test_a_missing_pre_is_a_warning_with_advice_for_llama_3(self):
        (warning,) = tokenizer_of(small_metadata(pre=None)).vocabulary.warnings
        assert "tokenizer.ggml.pre is missing" in warning
        assert "try --override tokenizer.ggml.pre=llama-bpe" in warning
        assert tokenizer_of(small_metadata()).vocabulary.warnings == ()

    def test_missing_token_types_mean_normal(self):
        tokenizer = tokenizer_of(small_metadata(token_type=None))
        # <|eot_id|> is CONTROL by its text; the others lose their special meaning.
        assert tokenizer.decode(tokenizer.encode("<|eot_id|>", add_bos=False)) == ""
        assert len(tokenizer.encode("<|start_header_id|>", add_bos=False)) > 1


class TestUnicodeTables:
    @pytest.mark.parametrize(("ranges", "category"), [("LETTER", "L"), ("NUMBER", "N"), ("PUNCTUATION", "P")])
    def test_ranges_are_the_general_categories(self, ranges, category):
        pairs = unicode_ranges.parse_ranges(getattr(unicode_ranges, ranges))
        assert pairs == sorted(pairs)
        ours = {code for first, last in pairs for code in range(first, last + 1)}
        assert len(ours) == sum(last - first + 1 for first, last in pairs)
        exact = unicodedata.unidata_version == unicode_ranges.UNICODE_VERSION
        # Another Python knows more or fewer characters; of those both know, none may differ.
        for code in range(0x110000):
            actual = unicodedata.category(chr(code))
            if exact or (actual != "Cn" and not _newer(code)):
                assert (code in ours) == (actual[0] == category), hex(code)

    def test_whitespace_is_what_the_reference_lists(self):
        ours = {c for a, b in unicode_ranges.parse_ranges(unicode_ranges.WHITESPACE) for c in range(a, b + 1)}
        # Python also counts the separators U+001C..U+001F, the White_Space property does not.
        assert ours == {c for c in range(0x110000) if chr(c).isspace()} - {0x1C, 0x1D, 0x1E, 0x1F}

    def test_char_class(self):
        assert unicode_ranges.char_class("41-5A AA") == r"\x{41}-\x{5A}\x{AA}"


def _newer(code):
    """Whether this Python may know ``code`` although Unicode 15.1 does not."""
    return tuple(map(int, unicodedata.unidata_version.split("."))) > (15, 1, 0) and not any(
        a <= code <= b
        for name in ("LETTER", "NUMBER", "PUNCTUATION")
        for a, b in unicode_ranges.parse_ranges(getattr(unicode_ranges, name))
    )


class TestDecode:
    @pytest.mark.parametrize("pre", PRES)
    def test_round_trip_is_exact(self, small, pre):
        for case in load("tokenizer_goldens_small.json")["cases"]:
            ids = small[pre].encode(case["text"], add_bos=False)
            assert small[pre].decode_bytes(ids, skip_special=False) == case["text"].encode()

    def test_special_tokens_are_hidden_unless_asked_for(self, small):
        tokenizer = small["llama-bpe"]
        ids = tokenizer.encode("a<|eot_id|>b<|EOT_ID|>")
        assert tokenizer.decode(ids) == "ab<|EOT_ID|>"  # user-defined tokens are text
        assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>a<|eot_id|>b<|EOT_ID|>"
        unused = tokenizer.vocabulary.tokens.index("[PAD]")
        assert tokenizer.decode([unused], skip_special=False) == ""

    def test_token_outside_the_alphabet_decodes_as_bitnet_cpp_does(self):
        metadata = small_metadata(token_type=None)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "a b"]
        tokenizer = tokenizer_of(metadata)
        assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == b"a[UNK_BYTE_0x20a b]b"

    @pytest.mark.parametrize("bad", [-1, 653, 10**12])
    def test_id_outside_the_vocabulary(self, small, bad):
        with pytest.raises(TokenizerError, match=f"token id {bad} is outside the vocabulary of 653 tokens"):
            small["default"].decode([bad])

    def test_stream_holds_back_incomplete_characters(self, small):
        tokenizer = small["default"]
        index = {text: i for i, text in enumerate(tokenizer.vocabulary.tokens)}
        stream = tokenizer.decode_stream()
        pieces = [stream.push(index[ALPHABET[byte]]) for byte in "a€😀".encode()]
        assert pieces == ["a", "", "", "€", "", "", "", "😀"]
        assert stream.flush() == ""

    def test_stream_ends_with_a_replacement_character(self, small):
        tokenizer = small["default"]
        index = {text: i for i, text in enumerate(tokenizer.vocabulary.tokens)}
        stream = tokenizer.decode_stream()
        assert [stream.push(index[ALPHABET[byte]]) for byte in "€".encode()[:2]] == ["", ""]
        assert stream.flush() == "\ufffd"
        assert tokenizer.decode([index[ALPHABET[byte]] for byte in "€".encode()[:2]]) == "\ufffd"


class TestBytesThatAreNotUtf8:
    @pytest.fixture(scope="class")
    @staticmethod
    def both():
        metadata = SimpleNamespace(metadata=small_metadata("gpt-2"))
        return {generation: Tokenizer.from_gguf(metadata, generation) for generation in ("march", "main")}

    def test_march_ends_the_program_and_main_replaces_each_byte(self, both):
        with pytest.raises(InputError, match=r"byte 1 of the text, 0xE4, is not UTF-8: bitnet.cpp of March 2026"):
            both["march"].encode(b"a\xe4b")
        assert both["main"].encode(b"a\xe4b") == both["main"].encode("a\ufffdb")
        assert both["main"].encode(b"\xff\x80") == both["main"].encode("\ufffd\ufffd")
        assert both["main"].encode(b"\xf0\x9f\x98") == both["main"].encode("\ufffd" * 3)

    @pytest.mark.parametrize("generation", ["march", "main"])
    def test_overlong_forms_and_surrogates_pass(self, both, generation):
        tokenizer = both[generation]
        assert tokenizer.encode(b"\xc1\xa1b") == tokenizer.encode("ab")  # U+0061 in two bytes
        data = b"a\xed\xa0\x80b"
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == tokenizer.decodable(data) == data

    @pytest.mark.parametrize("generation", ["march", "main"])
    def test_numbers_beyond_unicode_end_the_program(self, both, generation):
        with pytest.raises(InputError, match=r"byte 2 of the text begins U\+110000, beyond Unicode"):
            both[generation].encode(b"ab\xf4\x90\x80\x80")

    def test_bytes_that_are_utf8_are_text(self, both):
        assert both["march"].encode("é中😀".encode()) == both["march"].encode("é中😀")


class TestBadInput:
    def test_lone_surrogate(self, small):
        with pytest.raises(InputError, match=r"not valid Unicode: .* at character 1"):
            small["default"].encode("a\udc80")

    def test_byte_without_a_token(self):
        metadata = small_metadata(merges=["a b"], token_type=None, bos_token_id=0, eos_token_id=0)
        metadata["tokenizer.ggml.tokens"] = ["a", "b", "ab"]
        tokenizer = tokenizer_of(metadata)
        assert tokenizer.encode("abba", add_bos=False) == [2, 1, 0]
        # Dropped, as bitnet.cpp does, but nothing is merged across it.
        assert tokenizer.encode("abcacb", add_bos=False) == [2, 0, 1]
        assert tokenizer.decodable("abcacb", add_bos=False) == b"abab"
        assert any(
            "no token stands for 241 byte values, the first 0x00" in one for one in tokenizer.vocabulary.warnings
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": None}, "the model has no tokenizer.ggml.model"),
            ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected 'gpt2' .* or 'llama'"),
            ({"model": 3}, "tokenizer.ggml.model is int, expected str"),
            ({"pre": "tekken"}, "pre-tokeniser 'tekken' .* is not supported; expected one of llama-bpe"),
            ({"tokens": None}, "the model has no tokenizer.ggml.tokens"),
            ({"tokens": []}, r"the vocabulary \(tokenizer.ggml.tokens\) is empty"),
            ({"tokens": np.arange(4)}, "tokenizer.ggml.tokens is not an array of strings"),
            ({"tokens": ["a", "a"], "token_type": [1, 1]}, "token 'a' occurs twice in the vocabulary"),
            ({"token_type": [1, 1]}, "token_type has 2 entries, expected 653, one per token"),
            ({"token_type": 1}, "token_type is not an array of integers"),
            ({"token_type": ["x"] * 653}, "token_type is not an array of integers"),
            ({"merges": None}, "the model has no tokenizer.ggml.merges"),
            ({"merges": ["ab"]}, "merges holds 'ab', expected two tokens"),
            ({"merges": ["a b c"]}, "merges holds 'a b c', expected two tokens"),
            ({"merges": ["a zzzz"]}, "merges does not fit the vocabulary: .*zzzz"),
            ({"merges": ["z z"]}, "merges does not fit the vocabulary: .*zz"),
            ({"bos_token_id": 653}, "bos_token_id is 653, outside the vocabulary of 653 tokens"),
            ({"eos_token_id": -1}, "eos_token_id is -1, outside the vocabulary"),
            ({"eot_token_id": "x"}, "eot_token_id is str, expected int"),
            ({"bos_token_id": True}, "bos_token_id is bool, expected int"),
            ({"add_bos_token": 1}, "add_bos_token is int, expected bool"),
        ],
    )
    def test_unusable_metadata(self, changes, message):
        with pytest.raises(TokenizerError, match=message) as caught:
            tokenizer_of(small_metadata(**changes))
        assert "\n" not in str(caught.value)


LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def small_json():
    """The small vocabulary as a tokenizer.json, laid out as Llama 3's is."""
    vocabulary = load("tokenizer_goldens_small.json")["vocabulary"]
    added = {2: True, 3: True, 4: False, 1: True}  # <|eot_id|> is NORMAL in the GGUF, special by its text
    tokens, kinds = vocabulary["tokens"], vocabulary["token_type"]
    specials = [i for i in range(642, 653) if tokens[i] != "[PAD]"]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_REGEX}, "behavior": "Isolated", "invert": False}
    bos = tokens[vocabulary["bos_token_id"]]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary["bos_token_id"]], "tokens": [bos]}},
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], "special": added[kinds[i]]} for i in specials],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        "post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, template]},
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(tokens[:642])},
            "merges": [text.split(" ") for text in vocabulary["merges"]],
            "ignore_merges": True,
        },
    }


def changed(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


class TestFromJson:
    def write(self, tmp_path, data):
        path = tmp_path / "tokenizer.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    def test_gives_the_goldens_ids(self, tmp_path):
        tokenizer = Tokenizer.from_json(self.write(tmp_path, small_json()))
        assert tokenizer.pre == "llama-bpe"
        for case in load("tokenizer_goldens_small.json")["cases"]:
            assert tokenizer.encode(case["text"]) == case["ids"]["llama-bpe"]["special"], case["text"]
        assert tokenizer.eos_ids == set(load("tokenizer_goldens_small.json")["vocabulary"]["end_ids"])

    def test_gpt2_layout_and_merges_as_strings(self, tmp_path):
        data = small_json()
        data["pre_tokenizer"] = {**BYTE_LEVEL, "use_regex": True}
        data["post_processor"] = None
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        data["model"]["ignore_merges"] = False
        tokenizer = Tokenizer.from_json(self.write(tmp_path, data))
        assert tokenizer.pre == "gpt-2"
        for case in load("tokenizer_goldens_small.json")["cases"]:
            assert tokenizer.encode(case["text"]) == case["ids"]["gpt-2"]["special"], case["text"]

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("model", "type"), "Unigram", "the model is 'Unigram', expected 'BPE'"),
            (("model", "byte_fallback"), True, "the model sets byte_fallback"),
            (("normalizer",), {"type": "NFC"}, "the normaliser 'NFC' is not supported"),
            (("pre_tokenizer",), None, "the pre-tokeniser is not one of"),
            (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "x"}, "the pre-tokeniser is not one of"),
            (("added_tokens", 0, "lstrip"), True, "strips its surroundings"),
            (("added_tokens", 0, "id"), 3, "id 3 is .* and also the added token"),
            (("added_tokens", 0, "id"), 10**9, "ids run from 0 to 1000000000"),
            (("model", "vocab", "!"), 3, "same id"),
            (("model", "merges", 0), ["a"], "not a tokenizer.json of the expected layout"),
            (("model",), 7, "not a tokenizer.json of the expected layout"),
        ],
    )
    def test_refuses_what_it_would_tokenise_differently(self, tmp_path, path, value, message):
        data = small_json()
        changed(data, path, value)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_json(self.write(tmp_path, data))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": null}', "[" * 100_000])
    def test_refuses_files_that_are_something_else(self, tmp_path, text):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a"):
            Tokenizer.from_json(self.write(tmp_path, text))

    def test_missing_file(self, tmp_path):
        with pytest.raises(TokenizerError, match="cannot be read: No such file"):
            Tokenizer.from_json(tmp_path / "tokenizer.json")
