"""The right continuation of a prompt: greedy, by ``bitnet_py``, as far as a given text follows it."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.generate import generate
from bitnet_py.model import Model
from bitnet_py.sampler import GreedySampler
from crossval.texts.signature import Right, starts_with

MAX_TOKENS = 512


def right_text(model: Path, prompt: str, text: str) -> Right:
    """Return the right tokens after a rendered prompt, up to where ``text`` leaves them or they end.

    Raises:
        ModelError, TokenizerError, InputError: an unusable model or prompt.
    """
    with Model.from_gguf(model) as engine:
        tokenizer = engine.tokenizer
        made: list[bytes] = []
        given, ids = text.strip().encode(), tokenizer.encode(prompt)
        room = min(MAX_TOKENS, max(1, engine.config.context_length - len(ids)))
        steps = generate(engine, ids, max_tokens=room, sampler=GreedySampler(), stop_ids=tokenizer.eos_ids)
        for step in steps:
            if step.finish == "stop":
                return Right(tuple(made), ended=True)
            made.append(tokenizer.token_bytes(step.id))
            beyond = len(b"".join(made).strip()) > len(given)
            if not starts_with(text, made) or beyond:
                break
        return Right(tuple(made), ended=False)
