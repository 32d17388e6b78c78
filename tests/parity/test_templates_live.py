"""Chat templates beside ``llama_chat_apply_template``, which knows some by what their text contains."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_py.chat_template import FileTemplate
from bitnet_py.template import get_template
from crossval.bitnet_cpp.vocabulary import LiveVocabulary
from tests.support import vocabularies

pytestmark = pytest.mark.live

KNOWN = {
    "llama3": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    "gemma": (
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}{{ '<start_of_turn>model\n' }}"
    ),
    "falcon3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
        "{# what it is known by: <|user|>, and for main </s> #}{{ '<|assistant|>\n' }}"
    ),
}
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4 – vier"},
    {"role": "user", "content": "é中😀\n\nwhy"},
]


@pytest.mark.parametrize("generation", ["march", "main"])
def test_files_own_templates_and_built_in_ones(
    generation: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", "llama-bpe")
    with LiveVocabulary(path, request.getfixturevalue(f"{generation}_library")) as live:
        for name, source in KNOWN.items():
            assert FileTemplate(source).render_messages(TALK) == live.apply_template(source, TALK), name
            if name != "falcon3":
                assert get_template(name).render("What is 2+2?") == live.apply_template(source, TALK[:1]), name
        assert live.apply_template("{{ messages[0].content }}", TALK) is None
