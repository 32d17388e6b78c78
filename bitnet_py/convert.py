"""Write a model with its ternary matrices in another type, or under another architecture's name.

Everything else is copied byte for byte. I2_S is what bitnet.cpp reads; mainline llama.cpp reads TQ1_0 and TQ2_0,
and only models of architecture ``bitnet``. Codes never change. A scale is a float32 in I2_S and F32 and a float16
in the others, so converting from the first rounds it, once per matrix.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py.config import ARCHITECTURES
from bitnet_py.errors import ModelError, model_error
from bitnet_py.ggml_types import FILE_TYPES, GGMLType, tensor_size_bytes
from bitnet_py.gguf import GGUFFile, TensorInfo
from bitnet_py.projections import block_of, ternary_tensor
from bitnet_py.weights import I2SMatrix, Weights

_U32, _STRING = 4, 8  # GGUF value types


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    arch: str
    n_matrices: int
    scale_error: float
    """Largest relative change of a matrix's scale by rounding; 0: the weights are the same numbers."""
    activation: str | None
    """What the new architecture's name implies, where that is not what the old one's implied: another model."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    ggml_type: GGMLType,
    *,
    arch: str | None = None,
    other_activation: bool = False,
) -> Conversion:
    """Write the model in ``source`` to ``target``, which appears complete or not at all.

    Args:
        source: a model this engine can run.
        target: another path.
        ggml_type: of the ternary matrices.
        arch: name of the new architecture; None: the same.
        other_activation: whether that may imply another activation, which makes it another model.

    Raises:
        ModelError: ``source`` is not usable or does not fit the type, the architecture means another activation,
            or ``target`` cannot be written.
    """
    with GGUFFile.open(source) as gguf:
        weights = Weights.load(gguf)
        weights.check_finite()
        matrices = {matrix.name: matrix for matrix in weights.matrices()}
        old, new = weights.config.arch, arch or weights.config.arch
        before, after = ARCHITECTURES[old], ARCHITECTURES[new]
        same_graph = before.graph == after.graph
        if not same_graph or (not after.scales and any(matrix.factor != 1 for matrix in matrices.values())):
            raise ModelError(
                f"{gguf.path}: the graph of architecture {new} cannot compute this model of {old}; "
                "name an architecture that has the same operations"
            )
        activations = [before.activation, after.activation]
        if activations[0] != activations[1] and not other_activation:
            raise ModelError(
                f"{gguf.path}: architecture {old} means {activations[0]}, {new} means {activations[1]}: that "
                "would be another model; convert one of the same activation, or ask for the other activation"
            )
        for matrix in matrices.values():
            if matrix.cols % block_of(ggml_type):
                raise model_error(
                    gguf.path,
                    f"tensor {matrix.name}, row length for {ggml_type.name}",
                    expected=f"a multiple of {block_of(ggml_type)}",
                    found=matrix.cols,
                    remedy="this model cannot have that type",
                )
        path = Path(target)
        if path.exists() and path.samefile(gguf.path):
            raise ModelError(f"{path}: expected another file than the model that is converted")
        partial = path.with_name(path.name + ".partial")
        try:
            error = _write(partial, gguf, matrices, ggml_type, (old, new))
            os.replace(partial, path)
        except OSError as failed:
            raise ModelError(f"{path}: cannot be written: {failed.strerror or failed}") from None
        finally:
            partial.unlink(missing_ok=True)
    changed = activations[1] if activations[0] != activations[1] else None
    return Conversion(new, len(matrices), error, changed)


def _write(
    path: Path, gguf: GGUFFile, matrices: dict[str, I2SMatrix], ggml_type: GGMLType, arch: tuple[str, str]
) -> float:
    """Write the file and return the largest relative change of a scale."""
    infos = [_placed(info, ggml_type if info.name in matrices else info.type) for info in gguf.tensors.values()]
    error = 0.0
    with path.open("wb") as file:
        keys = list(_keys(gguf, ggml_type, *arch))
        file.write(b"GGUF" + struct.pack("<IQQ", gguf.version, len(infos), len(keys)))
        file.writelines(keys)
        offset = 0
        for info in infos:
            dims = info.shape[::-1]
            file.write(_string(info.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", info.type, offset))
            offset += -(-info.size_bytes // gguf.alignment) * gguf.alignment
        for info in infos:
            file.write(bytes(-file.tell() % gguf.alignment))
            data = gguf.data(info.name)
            if info.name in matrices and gguf.tensors[info.name].type is not ggml_type:
                matrix = matrices[info.name]
                data = ternary_tensor(matrix.data, matrix.scale, ggml_type)
                error = max(error, _scale_error(data, matrix.scale, ggml_type))
            file.write(data.data)
    return error


def _placed(info: TensorInfo, ggml_type: GGMLType) -> TensorInfo:
    size_bytes = tensor_size_bytes(info.shape, ggml_type)
    assert size_bytes is not None
    return TensorInfo(info.name, info.shape, ggml_type, 0, size_bytes)


def _scale_error(data: npt.NDArray[np.uint8], scale: float, ggml_type: GGMLType) -> float:
    if ggml_type in (GGMLType.I2_S, GGMLType.F32):
        return 0.0
    rounded = np.abs(data.view("<f2")).max() if ggml_type is GGMLType.F16 else data[-2:].view("<f2")[0]
    return abs(float(rounded) / scale - 1.0) if rounded else 0.0


def _keys(gguf: GGUFFile, ggml_type: GGMLType, old: str, new: str) -> Iterator[bytes]:
    """Yield every key with its value: those of the architecture under its new name."""
    changed: dict[str, tuple[int, Any]] = {
        "general.architecture": (_STRING, new),
        "general.file_type": (_U32, FILE_TYPES[ggml_type]),
    }
    for key in gguf.metadata:
        name = f"{new}.{key.removeprefix(f'{old}.')}" if key.startswith(f"{old}.") else key
        if key not in changed:
            yield _string(name) + gguf.raw_value(key)
            continue
        kind, value = changed[key]
        yield (
            _string(name)
            + struct.pack("<I", kind)
            + (_string(value) if kind == _STRING else struct.pack("<I", value))
        )


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
