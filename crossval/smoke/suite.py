"""Suites of questions with checkable answers: JSON lines, one prompt per line (docs/smoke.md).

    {"id": "sum-0", "family": "sum", "seen": false, "prompt": "What is 2+2?", "answer": "4."}
    {"id": "capital", "prompt": "What is the capital of France?", "pattern": "\\bParis\\b", "stop": "newline"}

A suite's digest is computed over the prompts themselves, not over the file, so that a receipt that holds every
prompt can prove which suite was used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from crossval.errors import BadInputError
from crossval.receipts.file import canonical_json
from crossval.schema import parse_json
from crossval.smoke import patterns

Stop = Literal["eos", "newline"]

SHIPPED = {"fixed": "fixed-10.jsonl", "long": "long-500.jsonl", "everyday": "everyday.jsonl"}
"""Words of ``--suite`` -> files in ``crossval/data/smoke``."""
DATA_DIR = Path(__file__).resolve().parents[1] / "data" / "smoke"

MAX_SIZE_BYTES = 16 << 20
MAX_PROMPTS = 10_000
MAX_PROMPT_CHARS = 100_000
MAX_NAME_CHARS = 300
_KEYS = ("id", "family", "seen", "prompt", "answer", "pattern", "stop")


@dataclass(frozen=True)
class SmokePrompt:
    """One question: exactly one of ``answer`` (the whole text) and ``pattern`` (found in the text) is given."""

    id: str
    family: str
    seen: bool | None
    """Whether the model was trained on exactly this question; None when unknown."""
    prompt: str
    answer: str | None = None
    pattern: str | None = None
    stop: Stop = "eos"
    """``newline``: generation also ends at the first newline after some text."""


@dataclass(frozen=True)
class Suite:
    """A named, non-empty list of prompts with unique ids."""

    name: str
    prompts: tuple[SmokePrompt, ...]

    @property
    def digest(self) -> str:
        """Return the sha256 of the prompts, hexadecimal (``digest_of``)."""
        return digest_of(self.prompts)


def digest_of(prompts: Sequence[SmokePrompt]) -> str:
    """Return the sha256 over the canonical JSON of the list of prompts, every field of each written out."""
    return hashlib.sha256(canonical_json([asdict(prompt) for prompt in prompts])).hexdigest()


def load_suite(word: str) -> Suite:
    """Return the suite called ``fixed``, ``long`` or ``everyday``, or the one in the file of that name.

    Raises:
        BadInputError: no such suite or file, or ``read_suite`` refuses it.
    """
    if word in SHIPPED:
        path = DATA_DIR / SHIPPED[word]
        if not path.is_file():
            raise BadInputError(
                f"the installation is broken: suite {word!r} should be {path}; reinstall the package"
            )
        return read_suite(path, word)
    path = Path(word)
    if not path.exists():
        raise BadInputError(f"suite {word!r} is neither {', '.join(SHIPPED)} nor a file")
    return read_suite(path)


def read_suite(path: Path, name: str | None = None) -> Suite:
    """Return the suite in a file; ``name`` defaults to the file's.

    Raises:
        BadInputError: unreadable, too large, not UTF-8, a line that is not a prompt, a duplicate id, or empty.
    """
    text = _read_text(path)
    # str.splitlines would also cut at characters that belong inside a prompt (U+2028, form feed).
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInputError(f"{path} has no prompts; a suite has one JSON object per line")
    if len(lines) > MAX_PROMPTS:
        raise BadInputError(f"{path} holds {len(lines)} prompts, at most {MAX_PROMPTS} are allowed")
    prompts = tuple(_prompt(line, number, f"{path}:{number}") for number, line in lines)
    first: dict[str, int] = {}
    for (number, _), prompt in zip(lines, prompts, strict=True):
        if prompt.id in first:
            raise BadInputError(f"{path}:{number}: id {prompt.id!r} is already used in line {first[prompt.id]}")
        first[prompt.id] = number
    wrong = patterns.defects(prompt.pattern for prompt in prompts if prompt.pattern is not None)
    for (number, _), prompt in zip(lines, prompts, strict=True):
        if prompt.pattern is not None and wrong[prompt.pattern] is not None:
            raise BadInputError(f"{path}:{number}: pattern {prompt.pattern[:80]!r} {wrong[prompt.pattern]}")
    return Suite(name or path.name, prompts)


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise BadInputError(f"cannot read suite {path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_SIZE_BYTES + 1)
        if len(data) > MAX_SIZE_BYTES:
            raise BadInputError(f"{path}: larger than {MAX_SIZE_BYTES} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read suite {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not UTF-8 at byte {error.start}") from error


def _prompt(line: str, number: int, where: str) -> SmokePrompt:
    value = parse_json(line.encode(), where)
    if not isinstance(value, dict):
        raise BadInputError(
            f'{where}: expected an object like {{"prompt": "2+2=", "answer": "4"}}, got {_kind(value)}'
        )
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise BadInputError(f"{where}: unknown field {unknown[0]!r}; a prompt has {', '.join(_KEYS)}")
    seen = value.get("seen")
    if seen is not None and not isinstance(seen, bool):
        raise BadInputError(f"{where}: seen: expected true, false or null, got {_kind(seen)}")
    stop = value.get("stop", "eos")
    if stop not in ("eos", "newline"):
        raise BadInputError(f'{where}: stop: expected "eos" or "newline", got {stop!r}')
    prompt = SmokePrompt(
        id=_text(value, "id", where, str(number), MAX_NAME_CHARS),
        family=_text(value, "family", where, "all", MAX_NAME_CHARS),
        seen=seen,
        prompt=_text(value, "prompt", where),
        answer=_text(value, "answer", where) if value.get("answer") is not None else None,
        pattern=_text(value, "pattern", where) if value.get("pattern") is not None else None,
        stop=stop,
    )
    if (prompt.answer is None) == (prompt.pattern is None):
        raise BadInputError(f"{where}: expected either an answer or a pattern")
    if prompt.answer is not None and not prompt.answer.strip():
        raise BadInputError(f"{where}: the answer is only whitespace: it would match an empty answer")
    return prompt


def _text(
    value: Mapping[str, Any], key: str, where: str, default: str | None = None, limit: int = MAX_PROMPT_CHARS
) -> str:
    text = value.get(key)
    text = default if text is None else text
    if not isinstance(text, str) or not text:
        raise BadInputError(f"{where}: {key}: expected a text, got {_kind(text)}")
    if len(text) > limit:
        raise BadInputError(f"{where}: {key}: {len(text)} characters, at most {limit} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{where}: {key}: not valid Unicode at character {error.start}") from error
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return "an empty text" if value == "" else names.get(type(value), "a number")
