"""Goldens: traces of real bitnet.cpp beside a model, so that parity can be checked without a C++ build.

For the shipped model, of March 2026's bitnet.cpp: two short prompts with every tap, eight more with
every layer's output and the logits, 32 greedy steps each, in under 10 MB. Of main: the two prompts
with every tap that exists there, without flash attention and with it, and two prompts more as
people run them; 8 steps each, in under 5 MB. ``--reference auto`` uses March's only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossval.engines.record import record_trace, trace_model
from crossval.errors import BadInputError
from crossval.files import read_limited
from crossval.model import taps
from crossval.passes import Runner
from crossval.terms import Generation
from crossval.traces.read import MAX_TRACE_JSON_BYTES, TRACE_FILE, Trace, TraceInfo

SUFFIX = ".goldens"
FULL_PROMPTS = ("What is 2+2?", "The capital of France is")
OUTLINE_PROMPTS = (
    "Hello",
    "Once upon a time, there was a small house at the end of the road.",
    "1, 2, 3, 4, 5,",
    "def add(a, b):\n    return a + b\n",
    "The opposite of hot is cold. The opposite of up is",
    "Monday, Tuesday, Wednesday,",
    "Is a whale larger than a mouse? Answer yes or no.",
    "naïve café, Zürich, 東京, 🙂",
)
N_DECODE = 32
N_DECODE_MAIN = 8
OUTLINE_PROMPTS_MAIN = (OUTLINE_PROMPTS[1], OUTLINE_PROMPTS[7])
AS_RUN = "flash-"
"""Before the name of a golden that was recorded with flash attention."""
N_DECODE_FULL = 1
"""Decode passes of the full prompts that get every tap too."""


def slug(prompt: str) -> str:
    """Return a directory name for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


@dataclass(frozen=True)
class Golden:
    """A trace stored beside a model."""

    path: Path
    info: TraceInfo


def goldens_dir(model_path: str | Path, generation: Generation = "march") -> Path:
    """Return where the goldens of ``model.gguf`` are: ``model.goldens/``, or ``model.goldens-main/``."""
    path = Path(model_path)
    suffix = SUFFIX if generation == "march" else f"{SUFFIX}-{generation}"
    return path.with_name(path.name.removesuffix(".gguf") + suffix)


def list_goldens(model_path: str | Path, generation: Generation = "march") -> list[Golden]:
    """Return the finished traces beside a model, sorted by name.

    Raises:
        BadInputError: one of them is malformed.
    """
    return [Golden(path, Trace.open(path).info) for path in _finished(goldens_dir(model_path, generation))]


def _finished(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    try:
        return sorted(path for path in root.iterdir() if (path / TRACE_FILE).exists())
    except OSError as error:
        raise BadInputError(f"cannot read {root}: {error.strerror or error}") from error


def find_golden(model_path: str | Path, model_sha256: str, prompt: str | Sequence[int]) -> Path | None:
    """Return the golden of exactly this model file and prompt (text or token ids), or None.

    Of several, the one with the most passes, then the most taps, is chosen. Those that state another prompt are
    not looked at further.

    Raises:
        BadInputError: a golden beside the model is malformed, as far as it was looked at.
    """
    candidates = [path for path in _finished(goldens_dir(model_path)) if not _is_of_another(path, prompt)]
    matching = [
        golden
        for golden in (Golden(path, Trace.open(path).info) for path in candidates)
        if golden.info.model.sha256 == model_sha256 and _same_prompt(golden.info, prompt)
    ]
    best = max(matching, key=_extent, default=None)
    return None if best is None else best.path


def _is_of_another(path: Path, prompt: str | Sequence[int]) -> bool:
    """Return whether a trace states another prompt; what cannot be told is left to the reader of traces."""
    try:
        stated = json.loads(read_limited(path / TRACE_FILE, "trace", MAX_TRACE_JSON_BYTES))["prompt"]
        found = stated["text"] if isinstance(prompt, str) else stated["token_ids"]
    except (BadInputError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(found != (prompt if isinstance(prompt, str) else list(prompt)))


def _same_prompt(info: TraceInfo, prompt: str | Sequence[int]) -> bool:
    return info.prompt_text == prompt if isinstance(prompt, str) else info.prompt_ids == tuple(prompt)


def _extent(golden: Golden) -> tuple[int, int]:
    return len(golden.info.passes), sum(len(recorded.taps) for recorded in golden.info.passes)


def record_goldens(runner: Runner, model_path: Path, out: Path) -> Iterator[Path]:
    """Record every golden that an entered runner gives; yields each trace directory when it is written.

    An engine that has flash attention by default is asked for twice: without it, and as people run it.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: from the runner.
    """
    model = trace_model(model_path)
    outline = taps.outline_taps(model.n_layers)
    numerics = runner.identity.numerics
    as_run, older = numerics.flash_attention is True, numerics.flash_attention is None
    others = OUTLINE_PROMPTS if older else OUTLINE_PROMPTS_MAIN if as_run else ()
    for prompt in (*FULL_PROMPTS, *others):
        full = prompt in FULL_PROMPTS
        directory = out / ((AS_RUN if as_run else "") + slug(prompt))
        record_trace(
            runner,
            model,
            directory,
            prompt_ids=runner.tokenize(prompt),
            prompt_text=prompt,
            n_decode=N_DECODE if older else N_DECODE_MAIN,
            select_prefill=None if full else outline,
            n_decode_full=N_DECODE_FULL if full else 0,
            overwrite=True,
        )
        yield directory
