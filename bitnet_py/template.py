"""Chat templates: how one user prompt is wrapped before it is tokenised. The tokenizer adds BOS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitnet_py.chat_template import AUTO, FileTemplate
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
        Template(
            "chatml",
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            special_tokens=("<|im_start|>", "<|im_end|>"),
        ),
        # chat_template in tokenizer_config.json of Gemma
        Template(
            "gemma",
            "<start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
            strip=True,
            special_tokens=("<start_of_turn>", "<end_of_turn>"),
        ),
    )
}


NAMES = (AUTO, *TEMPLATES)
"""Values of ``--template``."""


def get_template(name: str, metadata: Mapping[str, Any] | None = None) -> Template | FileTemplate:
    """Return the template called ``name``; ``auto`` is the one in a model file's metadata.

    Raises ``InputError`` for an unknown one, and where the file has none.
    """
    if name == AUTO:
        return FileTemplate.from_metadata(metadata or {})
    if name not in TEMPLATES:
        raise InputError(f"unknown template {name!r}; expected one of {', '.join(NAMES)}")
    return TEMPLATES[name]
