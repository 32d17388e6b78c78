import pytest

from bitnet_py.special_tokens import ROLES, SPECIAL_TEXTS, TokenKind, assign


def assigned(texts, generation, stated=(), kinds=None):
    index = {text: i for i, text in enumerate(texts)}
    roles = dict.fromkeys(ROLES) | dict(stated)
    found = assign(index, kinds or [TokenKind.NORMAL] * len(texts), roles, generation)
    return found.kinds, found.end_ids


@pytest.mark.parametrize("generation", SPECIAL_TEXTS)
def test_texts_that_end_generation_are_control(generation):
    for text in SPECIAL_TEXTS[generation].end:
        assert assigned(["a", text], generation) == ((TokenKind.NORMAL, TokenKind.CONTROL), {1})


def test_main_knows_more_ends_than_march():
    for text in ("</s>", "<|end_of_text|>", "[EOT]"):
        assert assigned([text], "march") == ((TokenKind.NORMAL,), set())
        assert assigned([text], "main") == ((TokenKind.CONTROL,), {0})


def test_a_role_goes_to_one_text_unless_a_key_gives_it():
    texts = ["<|fim_prefix|>", "<PRE>", "<|fim_pad|>"]
    assert assigned(texts, "march") == ((TokenKind.CONTROL, TokenKind.NORMAL, TokenKind.CONTROL), {2})
    given = {"fim_pre": 1, "fim_pad": 1}
    assert assigned(texts, "march", given) == ((TokenKind.NORMAL,) * 3, {1})


def test_ids_of_keys_end_generation():
    assert assigned(["a", "b", "c"], "march", {"bos": 0, "eos": 1, "eot": 2})[1] == {1, 2}


def test_main_shows_the_channels_of_harmony():
    texts = ["<|channel|>", "<|return|>", "<|call|>", "<|end|>"]
    kinds, ends = assigned(texts, "main", kinds=[TokenKind.CONTROL] * 4)
    assert kinds == (TokenKind.USER_DEFINED, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.USER_DEFINED)
    assert ends == {1, 2}
    assert 3 in assigned(texts, "march")[1]


def test_main_does_not_end_at_the_slash_s_of_a_model_with_tool_responses():
    kinds, ends = assigned(["</s>", "<|tool_response>"], "main")
    assert (kinds[0], ends) == (TokenKind.NORMAL, {1})
