"""Read Hugging Face checkpoints: safetensors files and ``config.json``, one tensor in memory at a time.

A checkpoint is a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the
shards it names; or one .safetensors file, whose folder holds ``config.json``. The ``safetensors``
package opens and checks every file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from bitnet_py.errors import ModelError, clip, model_error

MAX_JSON_BYTES = 256 << 20
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download the checkpoint again"
DTYPES: Mapping[str, str] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "U8": "uint8",
    "I8": "int8",
}
"""Types that can be read: name in safetensors -> name here."""


class Checkpoint:
    """An open checkpoint: names, shapes and types of its tensors, and their values on demand."""

    def __init__(self, folder: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self.folder = folder
        self.config = config
        """``config.json``."""
        self.files = files
        """Tensor name -> file that holds it."""
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder or one .safetensors file; reads no tensor.

        Raises:
            ModelError: missing, unreadable or malformed files, no ``config.json``, or a tensor that the
                index places in a file that lacks it.
        """
        given = Path(path)
        folder = given if given.is_dir() else given.parent
        if given.is_dir():
            parts = _parts(given)
        elif given.is_file():
            parts = {None: [given]}
        else:
            raise model_error(
                given, "checkpoint", expected="a folder or a .safetensors file", found="nothing", remedy="check it"
            )
        config = read_json(folder / "config.json")
        checkpoint = cls(folder, config, {})
        files: dict[str, Path] = {}
        for part in dict.fromkeys(part for names in parts.values() for part in names):
            for name in checkpoint._file(part).keys():  # noqa: SIM118  # not a dict
                if name in files:
                    raise _error(part, f"tensor {clip(name)}", "one place", f"it in {files[name].name} as well")
                files[name] = part
        for name, (part,) in ((name, places) for name, places in parts.items() if name is not None):
            if files.get(name) != part:
                raise _error(folder / INDEX_NAME, f"tensor {clip(name)}", f"it in {part.name}", "no such tensor")
        checkpoint.files = files
        return checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as stored; a packed matrix has a quarter of its rows."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a tensor, a value of ``DTYPES``.

        Raises:
            ModelError: it has another type.
        """
        stored = str(self._slice(name).get_dtype())
        if stored not in DTYPES:
            raise _error(self.files[name], f"tensor {clip(name)}, type", " or ".join(DTYPES), stored)
        return DTYPES[stored]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor; bfloat16 is widened to float32, which is exact.

        Raises:
            ModelError: no such tensor, or a type that cannot be read.
        """
        if self.dtype(name) == "bfloat16":
            return widen_bfloat16(self._bfloat16(name, slice(None)))
        array: npt.NDArray[Any] = self._file(self.files[name]).get_tensor(name)
        return array

    def rows(self, name: str, some: slice) -> npt.NDArray[Any]:
        """Return some rows of a matrix as ``tensor`` does; only they are read."""
        if self.dtype(name) == "bfloat16":
            return widen_bfloat16(self._bfloat16(name, some))
        array: npt.NDArray[Any] = self._slice(name)[some]
        return array

    def _bfloat16(self, name: str, some: slice) -> npt.NDArray[np.uint16]:
        """Return the bits of a bfloat16 tensor, or of some rows: NumPy, and so the package, has no such type.

        The package has checked the header (offsets in bounds, sizes that fit the shapes) when it opened
        the file. Format: u64 size of the header | JSON | data, offsets relative to the data.
        """
        path = self.files[name]
        shape = self.shape(name)
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            (start, _) = json.loads(file.read(size))[name]["data_offsets"]
        held = np.memmap(path, "<u2", "r", 8 + size + start, shape or (1,))
        bits: npt.NDArray[np.uint16] = np.array(held[some])
        return bits

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise _error(self.folder, f"tensor {clip(name)}", "it in the checkpoint", f"{len(self.files)} others")
        return self._file(self.files[name]).get_slice(name)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            if not path.is_file():
                raise _error(path, "checkpoint", "a regular file", "none")
            try:
                self._open[path] = safe_open(str(path), framework="np")
            except (SafetensorError, OSError) as error:
                raise _error(path, "file", "safetensors", " ".join(str(error).split())) from None
        return self._open[path]

    def close(self) -> None:
        """Release all files."""
        self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 values, given as their bits, as float32."""
    wide: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        ModelError: unreadable, too large, or not a JSON object.
    """
    try:
        if not path.is_file():
            raise _error(path, "file", "JSON", "no such file", "give the checkpoint's whole folder")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _error(path, "file", f"at most {MAX_JSON_BYTES} bytes", path.stat().st_size)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(path, "file", "a readable file", error.strerror or error) from None
    except (ValueError, RecursionError) as error:
        raise _error(path, "file", "JSON", error) from None
    if not isinstance(value, dict):
        raise _error(path, "file", "a JSON object", type(value).__name__)
    return value


def _parts(folder: Path) -> dict[str | None, list[Path]]:
    """Return the files of a folder; of a sharded checkpoint by tensor name."""
    index = folder / INDEX_NAME
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise _error(index, "weight_map", "an object of tensor names", type(places).__name__)
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise _error(index, f"tensor {clip(name)}", "a file name", clip(str(file)))
        return {name: [folder / file] for name, file in places.items()}
    if (folder / SINGLE_NAME).exists():
        return {None: [folder / SINGLE_NAME]}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        expected = f"{SINGLE_NAME}, {INDEX_NAME}, or one other .safetensors file"
        raise _error(folder, "checkpoint", expected, f"{len(found)} such files and no index")
    return {None: found}


def _error(path: object, what: str, expected: object, found: object, remedy: str = _AGAIN) -> ModelError:
    return model_error(path, what, expected=expected, found=found, remedy=remedy)
