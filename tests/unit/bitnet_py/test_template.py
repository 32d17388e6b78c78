import pytest

from bitnet_py.errors import InputError
from bitnet_py.template import TEMPLATES, get_template


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("raw", " What is 2+2?\n"),
        ("bitnet", "User: What is 2+2?<|eot_id|>Assistant: "),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_render(name, text):
    assert get_template(name).render(" What is 2+2?\n") == text


def test_special_tokens_listed_are_the_ones_used():
    for template in TEMPLATES.values():
        text = template.render("x")
        for token in template.special_tokens:
            assert token in text
            text = text.replace(token, "")
        assert "<" not in text


def test_unknown_template():
    with pytest.raises(InputError, match="unknown template 'x'; expected one of auto, raw, bitnet, llama3"):
        get_template("x")
