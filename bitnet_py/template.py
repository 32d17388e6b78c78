"""Chat templates: how one user prompt is wrapped before it is tokenised. The tokenizer adds BOS."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_py.errors import InputError


@dataclass(frozen=True)
class Template:
    """One turn of a chat: ``before`` + prompt + ``after``, and the special tokens this relies on."""

    name: str
    before: str = ""
    after: str = ""
    strip: bool = False
    """Whether whitespace around the prompt is dropped, as the models' own templates do (``| trim``)."""
    special_tokens: tuple[str, ...] = ()

    def render(self, prompt: str) -> str:
        """Return ``prompt`` as the text to tokenise, special tokens parsed."""
        return self.before + (prompt.strip() if self.strip else prompt) + self.after


TEMPLATES = {
    template.name: template
    for template in (
        Template("raw"),
        # chat_template in tokenizer_config.json of microsoft/bitnet-b1.58-2B-4T
        Template("bitnet", "User: ", "<|eot_id|>Assistant: ", strip=True, special_tokens=("<|eot_id|>",)),
        # chat_template in tokenizer_config.json of Llama 3 Instruct
        Template(
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            strip=True,
            special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
    )
}


def get_template(name: str) -> Template:
    """Return the template called ``name``. Raises ``InputError`` for an unknown one."""
    if name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
