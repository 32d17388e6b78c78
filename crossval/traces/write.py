"""Write traces pass by pass, one in memory at a time; ``trace.json`` comes last and makes a trace complete."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from crossval.errors import BadInputError
from crossval.files import temporary, utc_now, write_atomically
from crossval.model import taps
from crossval.model.taps import shape_hint
from crossval.passes import EngineIdentity, PassRecord, TapArray, check_rows, pass_kind
from crossval.traces import dtypes
from crossval.traces.read import (
    FORMAT,
    FORMAT_VERSION,
    TRACE_FILE,
    TraceInfo,
    TraceModel,
    expected_shape,
    parse_info,
    pass_file_name,
    tensor_key,
)

_PART = ".part"
"""Ends the name of a file that is not whole yet."""


class TraceWriter:
    """Writes one trace: ``add_pass`` in order, then ``finish``; without it, leaving the block leaves no trace."""

    def __init__(self, directory: str | Path, model: TraceModel, *, overwrite: bool = False) -> None:
        """Prepare ``directory``: it must be absent, empty, or (``overwrite``) hold an earlier trace.

        An earlier trace stays until ``finish``: the new one is written beside it and then takes its place.

        Raises:
            BadInputError: the directory holds something else, or cannot be written.
        """
        self.directory = Path(directory)
        self._model = model
        self._passes: list[dict[str, Any]] = []
        self._n_tokens = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            present = sorted(path.name for path in self.directory.iterdir())
            ours = [name for name in present if name == TRACE_FILE or _is_pass_file(name)]
            if present and (not overwrite or ours != present):
                raise BadInputError(
                    f"{self.directory} is not empty ({present[0]}); choose a new directory"
                    + ("" if ours != present else " or ask to overwrite the trace in it")
                )
        except OSError as error:
            raise self._unusable(error) from error
        self._replaces = bool(present)
        self._into = self.directory
        """Where files are written until all of them are."""
        self._held = contextlib.ExitStack()

    def _unusable(self, error: OSError) -> BadInputError:
        return BadInputError(f"cannot write a trace to {self.directory}: {error.strerror or error}")

    def __enter__(self) -> TraceWriter:
        if self._replaces:
            place = self.directory.resolve()
            try:
                self._into = self._held.enter_context(temporary(place.parent, f".{place.name}.", is_folder=True))
                shutil.copymode(place, self._into)
            except OSError as error:
                self._held.close()
                raise self._unusable(error) from error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._held.close()
        if not self._replaces and not (self.directory / TRACE_FILE).exists():
            for index in range(len(self._passes) + 1):
                (self.directory / pass_file_name(index)).unlink(missing_ok=True)

    def add_pass(self, record: PassRecord) -> None:
        """Write the next pass with all taps of ``record``.

        Raises:
            BadInputError: the pass does not follow the one before it, or a tap has the wrong shape
            or type.
        """
        index = len(self._passes)
        plan = record.plan
        if plan.start != self._n_tokens or not plan.token_ids:
            raise BadInputError(f"pass {index} starts at {plan.start}; the passes before it hold {self._n_tokens}")
        if plan.kind != pass_kind(len(plan.token_ids), plan.start):
            raise BadInputError(
                f"pass {index} of {len(plan.token_ids)} token(s) at {plan.start} is not {plan.kind}"
            )
        if not record.taps:
            raise BadInputError(f"pass {index} has no taps: a pass that holds nothing cannot be compared")
        arrays: dict[str, TapArray] = {}
        try:
            for name in sorted(record.taps, key=lambda name: taps.execution_index(name, self._model.n_layers)):
                arrays[name] = record.taps[name]
                self._check(name, arrays[name], record)
        except ValueError as error:
            raise BadInputError(f"pass {index}: {error}") from error
        path = self._into / pass_file_name(index)
        tensors = {tensor_key(index, name): tap for name, tap in arrays.items()}
        self._passes.append(
            {
                "kind": plan.kind,
                "start": plan.start,
                "token_ids": list(map(int, plan.token_ids)),
                "elapsed_s": record.elapsed_s,
                "file": path.name,
                "sha256": write_safetensors(path, tensors),
                "taps": [_tap_entry(name, tap) for name, tap in arrays.items()],
            }
        )
        self._n_tokens += len(plan.token_ids)

    def _check(self, name: str, tap: TapArray, record: PassRecord) -> None:
        check_rows(name, tap.rows, len(record.plan.token_ids))
        expected = expected_shape(name, self._model, record.plan, tap.rows)
        if tap.array.dtype != np.float32 or tap.array.shape != expected:
            why = shape_hint(name, tap.array.shape, expected)
            given = f"{name} is {tap.array.dtype} {tap.array.shape}, expected float32 {expected}"
            raise ValueError(f"{given}: {why}" if why else given)
        try:
            dtypes.stored(tap.array, tap.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def finish(
        self,
        *,
        engine: EngineIdentity,
        prompt_ids: Sequence[int],
        prompt_text: str | None = None,
        notes: Sequence[str] = (),
    ) -> TraceInfo:
        """Write ``trace.json``, which makes the directory a trace, and return its contents.

        Raises:
            BadInputError: the result would not be a valid trace (no passes, or other tokens fed than
            the prompt's), or it cannot be written.
        """
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_at": utc_now(),
            "engine": engine.to_json(),
            "model": {name: one for name, one in vars(self._model).items() if one is not None},
            "prompt": {"text": prompt_text, "token_ids": list(map(int, prompt_ids))},
            "passes": self._passes,
            "notes": list(notes),
        }
        path = self.directory / TRACE_FILE
        try:
            data = _dump(value).encode("utf-8")
        except (TypeError, ValueError) as error:
            raise BadInputError(f"{path}: cannot be written as JSON: {error}") from error
        info = parse_info(data, str(path))
        try:
            write_atomically(self._into / TRACE_FILE, data)
            if self._replaces:
                _take_place_of(self.directory.resolve(), self._into)
        except OSError as error:
            raise BadInputError(f"cannot write {path}: {error.strerror or error}") from error
        return info


def _take_place_of(old: Path, new: Path) -> None:
    """Put the folder ``new`` where ``old`` is, which is where ``new`` was afterwards; neither is ever missing.

    Systems that cannot exchange two names take two steps: a process killed (SIGKILL) between them leaves the old
    folder beside its place.
    """
    if _exchanged(old, new):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name[:200]}.", dir=old.parent))
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux's ``renameat2``); False: it is not there, or not for these files."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def write_safetensors(path: Path, tensors: Mapping[str, TapArray]) -> str:
    """Write arrays in the formats they state as a safetensors file, one at a time, and return the file's sha256.

    Layout: uint64 little-endian header length, JSON header (padded with spaces to a multiple of 8),
    then the arrays one after another, little-endian (https://github.com/huggingface/safetensors,
    "Format").
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tap in tensors.items():
        end = offset + tap.array.size * dtypes.N_BYTES[tap.dtype]
        name = dtypes.NAME_OF[tap.dtype]
        header[key] = {"dtype": name, "shape": list(tap.array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    partial = path.with_name(path.name + _PART)
    try:
        with partial.open("wb") as file:
            for head in (len(text).to_bytes(8, "little"), text):
                digest.update(head)
                file.write(head)
            for tap in tensors.values():
                view = dtypes.stored(tap.array, tap.dtype).reshape(-1).view(np.uint8).data
                digest.update(view)
                file.write(view)
        os.replace(partial, path)
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def _tap_entry(name: str, tap: TapArray) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "dtype": dtypes.NAME_OF[tap.dtype], "shape": list(tap.array.shape)}
    if tap.rows is not None:
        entry["rows"] = list(map(int, tap.rows))
    return entry


def _is_pass_file(name: str) -> bool:
    return name.startswith("pass-") and name.removesuffix(_PART).endswith(".safetensors")


def _dump(value: dict[str, Any]) -> str:
    """Return JSON with one line per field, per pass field and per tap: readable, and short in a diff."""

    def line(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False, allow_nan=False)

    passes = []
    for item in value["passes"]:
        fields = [f'   "{key}": {line(part)}' for key, part in item.items() if key != "taps"]
        entries = ",\n".join(f"    {line(tap)}" for tap in item["taps"])
        passes.append("  {\n" + ",\n".join([*fields, f'   "taps": [\n{entries}\n   ]']) + "\n  }")
    head = [f' "{key}": {line(part)}' for key, part in value.items() if key != "passes"]
    joined = ",\n".join(passes)
    return "{\n" + ",\n".join([*head, f' "passes": [\n{joined}\n ]']) + "\n}\n"
