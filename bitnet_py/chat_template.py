"""The chat template of a model file (``tokenizer.chat_template``), rendered by jinja2 in a process with limits.

What it says is up to whoever wrote the file. So it runs in jinja2's sandbox, in a process of its own with limited
time and memory (``_render_template``).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py.errors import InputError

AUTO = "auto"
"""Name of the template that is the file's own."""
KEY = "tokenizer.chat_template"
MAX_SOURCE_BYTES = 1 << 20
MAX_TEXT_BYTES = 16 << 20
_CPU_S = 2
_TIMEOUT_S = 60.0
"""Of which a busy machine may give the process little."""
_MEMORY_BYTES = 1 << 30
_PROGRAM = Path(__file__).with_name("_render_template.py")


@dataclass(frozen=True)
class FileTemplate:
    """A model file's own template; stands where ``template.Template`` does."""

    source: str
    bos: str = ""
    eos: str = ""
    name: str = AUTO
    strip: bool = False
    special_tokens: tuple[str, ...] = ()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> FileTemplate:
        """Return the template of a GGUF file. Raises ``InputError`` when it has none."""
        source = metadata.get(KEY)
        if not isinstance(source, str) or not source:
            raise InputError(
                f"the model has no chat template ({KEY}); use --template raw, or one of the built-in ones"
            )
        if len(source.encode("utf-8", "surrogatepass")) > MAX_SOURCE_BYTES:
            raise InputError(f"{KEY} is longer than {MAX_SOURCE_BYTES} bytes")
        return cls(source, _text_of(metadata, "bos"), _text_of(metadata, "eos"))

    @property
    def digest(self) -> str:
        """sha256 of the template, hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, prompt: str) -> str:
        """Return one user prompt as the text to tokenise; BOS at its beginning is left to the tokenizer.

        Raises ``InputError`` for a template that fails, takes too long or too much memory.
        """
        return self.render_messages([{"role": "user", "content": prompt}]).removeprefix(self.bos)

    def render_messages(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return a conversation in the template, as it is. Raises ``InputError``."""
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        asked = {"source": self.source, "variables": variables, "cpu_s": _CPU_S, "memory_bytes": _MEMORY_BYTES}
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_PROGRAM)],
                input=json.dumps(asked).encode(),
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"the model's chat template takes more than {_TIMEOUT_S:g} s") from None
        if done.returncode != 0:
            why = "takes too much time or memory" if done.returncode < 0 else _last_line(done.stderr)
            raise InputError(f"the model's chat template {why}")
        if len(done.stdout) > MAX_TEXT_BYTES:
            raise InputError(f"the model's chat template makes more than {MAX_TEXT_BYTES} bytes of text")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise InputError(f"the model's chat template fails: {answer['error']}")
        return str(answer["text"])


def _text_of(metadata: Mapping[str, Any], role: str) -> str:
    tokens, token_id = metadata.get("tokenizer.ggml.tokens", ()), metadata.get(f"tokenizer.ggml.{role}_token_id")
    known = isinstance(token_id, int) and 0 <= token_id < len(tokens)
    return str(tokens[token_id]) if known else ""


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"cannot be rendered: {lines[-1] if lines else 'no reason given'}"
