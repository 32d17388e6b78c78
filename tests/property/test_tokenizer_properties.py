import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_py.errors import InputError, TokenizerError
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.vocabulary import Vocabulary

_GOLDENS = Path(__file__).resolve().parents[1] / "data" / "tokenizer_goldens_small.json"
_VOCABULARY = json.loads(_GOLDENS.read_text(encoding="utf-8"))["vocabulary"]
_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    **{f"tokenizer.ggml.{key}": _VOCABULARY[key] for key in ("tokens", "token_type", "merges")},
    **{f"tokenizer.ggml.{key}": _VOCABULARY[key] for key in ("bos_token_id", "eos_token_id")},
}
_TOKENIZERS = {
    pre: Tokenizer.from_gguf(SimpleNamespace(metadata={**_METADATA, "tokenizer.ggml.pre": pre}))
    for pre in ("llama-bpe", "default", "gpt-2")
}
_SIZE = _TOKENIZERS["default"].vocab_size

tokenizers = st.sampled_from(list(_TOKENIZERS.values()))
fragments = st.sampled_from(["<|eot_id|>", "<|eot", "_id|>", "  ", "\n", "'s", "123", "é", "中", "😀", "<unk>"])
texts = st.lists(st.one_of(fragments, st.text(max_size=8))).map("".join)
ids = st.lists(st.integers(0, _SIZE - 1))


@given(tokenizers, texts, st.booleans())
def test_decoding_gives_the_text_back(tokenizer, text, parse_special):
    tokens = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
    assert tokenizer.decode_bytes(tokens, skip_special=False) == text.encode()


@given(tokenizers, texts)
def test_without_special_parsing_no_control_token_appears(tokenizer, text):
    tokens = tokenizer.encode(text, add_bos=False, parse_special=False)
    control = {i for i, kind in enumerate(tokenizer.vocabulary.kinds) if kind in (2, 3)}
    assert control.isdisjoint(tokens)


@given(tokenizers, ids, st.booleans())
def test_stream_joined_equals_decode(tokenizer, tokens, skip_special):
    stream = tokenizer.decode_stream(skip_special=skip_special)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens, skip_special=skip_special)


@given(tokenizers, texts)
def test_stream_of_valid_text_never_shows_a_replacement(tokenizer, text):
    stream = tokenizer.decode_stream(skip_special=False)
    pieces = [stream.push(token) for token in tokenizer.encode(text, add_bos=False)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


@given(tokenizers, st.text(alphabet=st.characters(categories=["Cs", "L"]), max_size=8))
def test_surrogates_are_refused_and_only_they(tokenizer, text):
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        with pytest.raises(InputError):
            tokenizer.encode(text)
    else:
        tokenizer.encode(text)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 700),
    st.text(max_size=6),
    st.lists(st.one_of(st.text(max_size=4), st.integers(0, 7)), max_size=5),
)


@given(st.sampled_from(sorted(_METADATA)), anything)
def test_any_damaged_key_gives_a_vocabulary_or_one_clear_error(key, value):
    message = ""
    try:
        tokenizer = Tokenizer(Vocabulary.from_metadata({**_METADATA, key: value}))
        tokenizer.decode(range(tokenizer.vocab_size))
    except TokenizerError as error:
        message = str(error)
    assert "\n" not in message
