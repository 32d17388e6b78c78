"""What a sweep compares: its cells, the command of each, and a digest of everything that a cell depends on."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitnet_py
import crossval
from bitnet_py import _native
from bitnet_py.model import KERNEL_VARIABLE
from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.manifest import combined_digest
from crossval.engines import llama_package
from crossval.engines.goldens import list_goldens, slug
from crossval.engines.registry import find_word, row_of
from crossval.engines.words import PATH, TRACE, EngineWord
from crossval.errors import BadInputError
from crossval.files import file_sha256
from crossval.receipts import provenance
from crossval.receipts.file import canonical_json
from crossval.terms import Side
from crossval.traces.read import TRACE_FILE

FOLDER = "cells"
"""Where the receipts of cells are, beside the summary."""
MAX_CELLS = 100_000
MAX_PROMPT_BYTES = 100_000
"""A prompt is an argument of the cell's command, and Linux takes no longer ones."""


@dataclass(frozen=True)
class Cell:
    """One comparison of a sweep; numbers count from 0 within the sweep's lists."""

    model: int
    prompt: int
    candidate: int
    kernel: str | None
    """Family of kernels of our engine; None: its own choice, or an engine that has none to choose from."""


@dataclass(frozen=True)
class Sweep:
    """All cells: every model with every prompt, candidate and kernel family.

    ``n_steps``: compare that many greedy tokens; None: tap by tap, as ``crossval layers``.
    """

    models: tuple[Path, ...]
    prompts: tuple[str, ...]
    candidates: tuple[str, ...] = ("bitnet_py",)
    kernels: tuple[str, ...] = ()
    reference: str = "auto"
    template: str = "raw"
    n_threads: int | None = None
    n_decode: int | None = None
    n_steps: int | None = None

    def __post_init__(self) -> None:
        """Raise ``BadInputError`` for an engine that is none, a prompt that cannot be given, or too many cells."""
        for text in self.prompts:
            if "\0" in text or len(text.encode(errors="replace")) > MAX_PROMPT_BYTES:
                raise BadInputError(f"a prompt of a sweep has at most {MAX_PROMPT_BYTES} bytes, none of them NUL")
        shown = tuple(find_word("candidate", text).plain for text in self.candidates)
        for name in ("models", "prompts", "candidates", "kernels"):
            # Receipts and tables name an engine without its folder: two that are named alike cannot be told apart.
            values = shown if name == "candidates" else getattr(self, name)
            if len(set(values)) < len(values):
                twice = next(one for one in values if values.count(one) > 1)
                raise BadInputError(f"{name} of a sweep: {str(twice)[:80]!r} is given twice")
        if not 0 < len(self.cells) <= MAX_CELLS:
            raise BadInputError(f"a sweep of {len(self.cells)} cells; one has 1 to {MAX_CELLS}")

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, prompts of one model together."""
        chosen = [self._kernels(text) for text in self.candidates]
        places = itertools.product(range(len(self.models)), range(len(self.prompts)), range(len(self.candidates)))
        return tuple(Cell(*place, kernel) for place in places for kernel in chosen[place[2]])

    def _kernels(self, candidate: str) -> tuple[str | None, ...]:
        has_kernels = row_of(find_word("candidate", candidate)).has_kernels
        return (self.kernels if has_kernels else ()) or (None,)

    @functools.cached_property
    def model_sha256(self) -> tuple[str, ...]:
        """Digest of every model file. Raises ``BadInputError`` where one cannot be read."""
        return tuple(map(file_sha256, self.models))

    @property
    def command(self) -> str:
        """Name of the command that compares a cell, which is the kind of its receipt."""
        return "layers" if self.n_steps is None else "greedy"

    def arguments(self, cell: Cell) -> list[str]:
        """Return the cell's command after ``crossval``; it prints the receipt. Paths are absolute."""
        given: dict[str, Any] = {
            "prompt": self.prompts[cell.prompt],
            "model": os.path.abspath(self.models[cell.model]),
            "candidate": _absolute("candidate", self.candidates[cell.candidate]),
            "reference": _absolute("reference", self.reference),
            "template": self.template,
            "threads": self.n_threads,
            "decode": self.n_decode if self.n_steps is None else None,
            "steps": self.n_steps,
        }
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [self.command, *words, "--json"]

    def inputs(self, cell: Cell) -> dict[str, Any]:
        """Return everything that the cell's result follows from, files by digest; not the machine it runs on."""
        return {
            "command": self.command,
            "model": self.model_sha256[cell.model],
            "prompt": self.prompts[cell.prompt],
            "candidate": self._engine("candidate", self.candidates[cell.candidate], cell),
            "reference": self._engine("reference", self.reference, cell),
            "kernel": cell.kernel or os.environ.get(KERNEL_VARIABLE) or None,
            **self.settings,
            "tool": provenance_of_tool(),
            "code": code_digest(),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What all cells share, as a summary states it."""
        return {
            "template": self.template,
            "n_threads": self.n_threads,
            "n_decode": self.n_decode,
            "n_steps": self.n_steps,
        }

    @functools.cached_property
    def stated(self) -> dict[str, Any]:
        """What all cells share or are chosen from, as a summary states it: no path, no digest of an engine."""
        models = zip(self.models, self.model_sha256, strict=True)
        return {
            "tool": dict(provenance_of_tool()),
            "command": self.command,
            "models": [{"file_name": path.name, "sha256": sha256} for path, sha256 in models],
            "prompts": list(self.prompts),
            "candidates": [find_word("candidate", text).plain for text in self.candidates],
            "reference": find_word("reference", self.reference).plain,
            "settings": self.settings,
        }

    def _engine(self, side: Side, text: str, cell: Cell) -> dict[str, Any]:
        word = find_word(side, text)
        digest = engine_digest(word, self.models[cell.model])
        return {"word": word.plain, "digest": digest}

    def file(self, cell: Cell) -> str:
        """Return the path of the cell's receipt within the sweep's folder: it names the inputs by digest."""
        inputs = hashlib.sha256(canonical_json(self.inputs(cell))).hexdigest()
        return (
            f"{FOLDER}/{slug(self.models[cell.model].stem)}.{slug(self.prompts[cell.prompt])}.{inputs[:24]}.json"
        )


@functools.cache
def provenance_of_tool() -> Mapping[str, Any]:
    """Return the running tool's version, commit and dirty flag, asked once: git takes a while."""
    return provenance.tool_facts()


@functools.cache
def code_digest() -> str:
    """Return a digest of the Python code that computes and compares: a commit says nothing of edits after it."""
    roots = [Path(one.__file__ or "").parent for one in (bitnet_py, crossval)]
    return combined_digest(
        {
            f"{root.name}/{file.relative_to(root)}": file_sha256(file)
            for root in roots
            for file in sorted(root.rglob("*.py"))
        }
    )


def _absolute(side: Side, text: str) -> str:
    """Return an engine's word with its path, if it has one, from the root: a cell may run in another folder."""
    word = find_word(side, text)
    if word.name == TRACE:
        return os.path.abspath(text)
    if word.path is None or row_of(word).takes != PATH:
        return text
    return f"{word.name}:{os.path.abspath(word.path)}"


@functools.cache
def engine_digest(word: EngineWord, model: Path) -> str | None:
    """Return a digest of the files that an engine consists of here; None: it has none, or they are not here.

    A source checkout is built, once, before cells need it.

    Raises:
        BadInputError, UnavailableError: a path that leads to no library.
    """
    if word.name == TRACE:
        return file_sha256(Path(word.path or "") / TRACE_FILE)
    if word.name == "bitnet_py":
        return file_sha256(_native.library_path())
    if word.name == "transformers":
        return _packages("torch", "transformers")
    if row_of(word).takes == PATH or row_of(word).live is not None:
        found = _library(word)
        if found is not None:
            return combined_digest({str(file): file_sha256(file) for file in _parts(found)})
        if row_of(word).live is not None:
            goldens = (golden.path / TRACE_FILE for golden in list_goldens(model))
            return combined_digest({str(file.parent): file_sha256(file) for file in goldens})
    return None


def _library(word: EngineWord) -> Path | None:
    if word.path is not None:
        return library.resolve(word.path).path
    if word.name == "llama.cpp":
        return llama_package.find_library()
    found = library.find_library()
    return None if found is None else found.path


def _parts(found: Path) -> Iterator[Path]:
    """Yield a library and those built with it, each once: beside it, or where CMake leaves ggml's."""
    beside = [path for pattern in ("libllama*.so*", "libggml*.so*") for path in found.parent.glob(pattern)]
    in_tree = (found.parent.parent / "ggml").rglob("libggml*.so*")
    yield from sorted({found.resolve(), *(path.resolve() for path in (*beside, *in_tree))})


def _packages(*names: str) -> str | None:
    try:
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError:
        return None
