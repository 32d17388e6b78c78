"""Write a trained network as GGUF: ``python -m tools.train.export``. ``write_gguf`` needs NumPy only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import numpy.typing as npt

from bitnet_py.ggml_types import GGMLType, tensor_size_bytes
from bitnet_py.quants import i2_s_tensor, pack_i2_s, quantize_absmean
from tools.train.shape import Shape

ARCH = "bitnet-b1.58"
NAME = "BitNet b1.58, small question answerer"
SCALES = {"attn_v": 2.0**4, "ffn_gate": 2.0**-4, "ffn_up": 2.0**8}
"""Factors of a layer's matrices that do not change what it computes, up to the norms' eps.

V: a norm follows the heads. Gate and up: relu(g / 16)^2 * 256 u = relu(g)^2 * u. Multiplying by a
power of two is exact. With the scales of training, two classic faults (a skipped attention sub-norm,
SiLU instead of squared ReLU) hardly change the answers. Small gates and large heads make them matter,
and the model is there to show faults.
"""
_FILE_TYPE_I2_S = 40  # llama.h, LLAMA_FTYPE_MOSTLY_I2_S
_DTYPES = {GGMLType.F16: np.float16, GGMLType.F32: np.float32}

Arrays = Mapping[str, npt.NDArray[np.float32]]


class ExportError(click.ClickException):
    """The arrays do not form a model of the shape, or the file disagrees with the network."""


def _expected(shape: Shape) -> dict[str, tuple[GGMLType, tuple[int, ...]]]:
    """Return type and shape of every tensor, in file order."""
    out: dict[str, tuple[GGMLType, tuple[int, ...]]] = {
        "token_embd.weight": (GGMLType.F16, (shape.vocab_size, shape.dim))
    }
    for layer in range(shape.n_layers):
        for name, width in shape.norms().items():
            out[f"blk.{layer}.{name}.weight"] = (GGMLType.F32, (width,))
        for name, size in shape.matrices().items():
            out[f"blk.{layer}.{name}.weight"] = (GGMLType.I2_S, size)
    out["output_norm.weight"] = (GGMLType.F32, (shape.dim,))
    return out


def _encode(name: str, kind: GGMLType, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the bytes or values of one tensor as the file stores them."""
    if not np.isfinite(values).all():
        raise ExportError(f"tensor {name}: expected finite values, found NaN or infinity; the training diverged")
    if kind is GGMLType.I2_S:
        ternary, scale = quantize_absmean(values)
        return i2_s_tensor(pack_i2_s(ternary), scale).view(np.int8)
    return values.astype(_DTYPES[kind])


def _write_metadata(writer: Any, shape: Shape, vocabulary: Mapping[str, Any]) -> None:
    writer.add_string("general.name", NAME)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", _FILE_TYPE_I2_S)
    for key, value in (
        ("vocab_size", shape.vocab_size),
        ("context_length", shape.context_length),
        ("embedding_length", shape.dim),
        ("block_count", shape.n_layers),
        ("feed_forward_length", shape.hidden_dim),
        ("rope.dimension_count", shape.head_dim),
        ("attention.head_count", shape.n_heads),
        ("attention.head_count_kv", shape.n_kv_heads),
    ):
        writer.add_uint32(f"{ARCH}.{key}", value)
    writer.add_float32(f"{ARCH}.attention.layer_norm_rms_epsilon", shape.rms_eps)
    writer.add_float32(f"{ARCH}.rope.freq_base", shape.rope_base)
    for key, value in vocabulary.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))


def write_gguf(path: Path, shape: Shape, vocabulary: Mapping[str, Any], arrays: Arrays) -> None:
    """Write the model; the same arguments give the same bytes. The file appears complete or not at all.

    ``arrays``: float32 by GGUF tensor name, matrices unquantised; ``vocabulary``: the ``tokenizer.ggml.*`` keys.

    Raises:
        ExportError: a tensor is missing, unexpected, misshapen or not finite, or the vocabulary has another size.
    """
    expected = _expected(shape)
    if missing := sorted(expected.keys() ^ arrays.keys()):
        raise ExportError(f"expected the tensors of the shape, found {missing[0]!r} missing or unexpected")
    n_tokens = len(vocabulary["tokenizer.ggml.tokens"])
    if n_tokens != shape.vocab_size:
        raise ExportError(f"expected a vocabulary of {shape.vocab_size} tokens, found {n_tokens}")
    for name, (_, size) in expected.items():
        if arrays[name].shape != size:
            raise ExportError(f"tensor {name}: expected shape {size}, found {arrays[name].shape}")
    partial = path.with_name(path.name + ".partial")
    try:
        writer = gguf.GGUFWriter(partial, ARCH)
        _write_metadata(writer, shape, vocabulary)
        for name, (kind, size) in expected.items():
            # int8 for raw bytes: for uint8 the writer would compute element shapes, of a type it does not know.
            dtype = np.dtype(_DTYPES.get(kind, np.int8))
            writer.add_tensor_info(name, size, dtype, tensor_size_bytes(size, kind), raw_dtype=int(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (kind, _) in expected.items():
            writer.write_tensor_data(_encode(name, kind, arrays[name]))
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def rescaled(arrays: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """Return the arrays, by GGUF tensor name, with ``SCALES`` applied."""
    return {name: values * np.float32(SCALES.get(name.split(".")[-2], 1.0)) for name, values in arrays.items()}


def gguf_names(shape: Shape) -> dict[str, str]:
    """Return the name of each PyTorch parameter by its GGUF name."""
    names = {"token_embd.weight": "token_embd", "output_norm.weight": "output_norm.weight"}
    for layer in range(shape.n_layers):
        for part in (*shape.norms(), *shape.matrices()):
            names[f"blk.{layer}.{part}.weight"] = f"layers.{layer}.{part}.weight"
    return names


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True),
    default=Path("build/train/checkpoint.pt"),
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("models/bitnet-qa.gguf"), show_default=True)
def main(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as GGUF and check that the engine computes the same from it as PyTorch.

    Example: python -m tools.train.export --out models/bitnet-qa.gguf
    """
    import torch  # only this command needs it

    from tools.train.agreement import compare

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    shape = Shape(**state["shape"])
    arrays = {name: state["net"][key].float().numpy() for name, key in gguf_names(shape).items()}
    write_gguf(out, shape, state["metadata"], rescaled(arrays))
    click.echo(f"{out}: {out.stat().st_size} bytes, step {state['step']}")
    result = compare(state["net"], shape, out)
    click.echo(str(result))
    if not result.agrees:
        raise ExportError(f"{out}: expected the engine's logits to agree with PyTorch's, found {result}")


if __name__ == "__main__":
    main()
