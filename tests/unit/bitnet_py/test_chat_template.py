import time

import pytest

from bitnet_py import chat_template
from bitnet_py.chat_template import KEY, FileTemplate
from bitnet_py.errors import InputError
from bitnet_py.template import get_template

HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
LLAMA3 = (
    "{% for message in messages %}{% set content = "
    + HEADER.format("message['role']")
    + " + message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}"
)


def metadata(source=LLAMA3, **more):
    keys = {
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return {KEY: source, **keys, **more}


def test_it_renders_as_the_built_in_one_without_the_bos_that_the_tokenizer_adds():
    auto = get_template("auto", metadata())
    assert auto.render(" What is 2+2?\n") == get_template("llama3").render(" What is 2+2?\n")
    assert auto.render_messages([{"role": "user", "content": "x"}]).startswith("<s><|start_header_id|>user")


def test_what_templates_use_is_there():
    source = (
        "{%- for m in messages %}\n    {%- if m.role == 'x' %}{% continue %}{% endif %}\n"
        "{{ m.role | upper }}{{ eos_token }}{{ m | tojson }}\n{%- endfor %}{{ strftime_now('%Y') | length }}"
    )
    template = FileTemplate(source, "<s>", "</s>")
    text = template.render_messages([{"role": "x", "content": "a"}, {"role": "user", "content": "é"}])
    assert text == 'USER</s>{"role": "user", "content": "é"}4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "fails: TemplateError: no system role"),
        ("{% for %}", "fails: TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "fails: SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{% include 'x' %}", "fails: TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails: OverflowError"),
        ("{{ 'x' * 10**10 }}", "fails: MemoryError"),
    ],
)
def test_a_template_that_fails_is_one_clear_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        FileTemplate(source).render("x")
    assert "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "_CPU_S", 1)
    began = time.monotonic()
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="takes too much time or memory"):
        FileTemplate(endless).render("x")
    monkeypatch.setattr(chat_template, "_TIMEOUT_S", 0.2)
    with pytest.raises(InputError, match=r"takes more than 0\.2 s"):
        FileTemplate(endless).render("x")
    assert time.monotonic() - began < 60


def test_a_template_that_writes_too_much(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match="makes more than 1000 bytes"):
        FileTemplate("{{ 'x' * 2000 }}").render("x")


def test_a_file_without_a_template():
    with pytest.raises(InputError, match=r"no chat template \(tokenizer.chat_template\); use --template raw"):
        get_template("auto", {})
    with pytest.raises(InputError, match="no chat template"):
        get_template("auto", {KEY: 7})
    with pytest.raises(InputError, match="is longer than"):
        get_template("auto", {KEY: "x" * (chat_template.MAX_SOURCE_BYTES + 1)})


def test_a_template_without_special_ids():
    assert (
        FileTemplate.from_metadata({KEY: "{{ bos_token }}x", "tokenizer.ggml.bos_token_id": 5}).render("y") == "x"
    )
