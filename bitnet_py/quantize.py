"""Write a Hugging Face checkpoint as GGUF with I2_S matrices: ``bitnet quantize``.

Matrices become absmean codes and a scale, or keep the codes of a packed checkpoint and its scale
(``ternarise``). Norms are float32, the embedding and a separate head float16, as bitnet.cpp's
converter writes them with ``--outtype i2_s``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitnet_py.checkpoint_model import CheckpointModel, Role, Source
from bitnet_py.checkpoint_tokenizer import TokenizerKeys, read_tokenizer
from bitnet_py.config import I2_S_BLOCK
from bitnet_py.errors import ModelError, model_error
from bitnet_py.ggml_types import FILE_TYPES, GGMLType, tensor_size_bytes
from bitnet_py.quants import i2_s_tensor, pack_codes

TYPES: dict[Role, GGMLType] = {"matrix": GGMLType.I2_S, "norm": GGMLType.F32, "table": GGMLType.F16}

_WORDS: dict[Role, str] = {"matrix": "matrices", "norm": "norms", "table": "tables"}


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    arch: str
    n_tensors: dict[str, int]
    """Kind of tensor -> how many."""
    tied: bool
    pre: str
    """Pre-tokenizer, or ``SentencePiece``."""
    warnings: tuple[str, ...]
    """One line each."""


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Quantized:
    """Write the checkpoint in ``source`` to ``target``, which appears complete or not at all.

    One tensor is in memory at a time. ``progress``: called with a tensor's name, how many are done,
    how many there are.

    Raises:
        ModelError: an unusable checkpoint, one whose rows are not whole I2_S blocks, or ``target`` cannot be
            written.
        TokenizerError: a tokenizer that is not supported.
    """
    path = Path(target)
    with CheckpointModel.open(source) as model:
        for one in model.sources:
            if one.role == "matrix" and one.shape[1] % I2_S_BLOCK:
                raise model_error(
                    model.checkpoint.folder,
                    f"tensor {one.name}, row length",
                    expected=f"a multiple of {I2_S_BLOCK}",
                    found=one.shape[1],
                    remedy="I2_S cannot hold this model",
                )
        tokenizer = read_tokenizer(model.checkpoint.folder, model.header.vocab_size)
        partial = path.with_name(path.name + ".partial")
        try:
            _write(partial, model, tokenizer, progress)
            os.replace(partial, path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
        counts = Counter(_WORDS[one.role] for one in model.sources)
        pre = tokenizer.pre or "SentencePiece"
        return Quantized(model.header.arch, dict(counts), model.tied, pre, tokenizer.warnings)


def _write(
    path: Path, model: CheckpointModel, tokenizer: TokenizerKeys, progress: Callable[[str, int, int], None]
) -> None:
    writer = gguf.GGUFWriter(path, model.header.arch)
    try:
        _write_header(writer, model)
        _write_tokenizer(writer, tokenizer)
        for one in model.sources:
            ggml_type = TYPES[one.role]
            # int8, not uint8: of that the writer would take the shape for one in bytes.
            dtype = {GGMLType.F16: np.float16, GGMLType.F32: np.float32}.get(ggml_type, np.int8)
            size_bytes = tensor_size_bytes(one.shape, ggml_type)
            writer.add_tensor_info(one.target, one.shape, np.dtype(dtype), size_bytes, raw_dtype=int(ggml_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, one in enumerate(model.sources):
            progress(one.target, done, len(model.sources))
            writer.write_tensor_data(_data(model, one))
    finally:
        writer.close()


def _data(model: CheckpointModel, source: Source) -> Any:
    if source.role == "norm":
        return model.norm(source)
    if source.role == "table":
        table = np.empty(source.shape, np.float16)
        first = 0
        for rows in model.table(source):
            table[first : first + len(rows)] = rows
            first += len(rows)
        return table
    ternary = model.ternary(source)
    return i2_s_tensor(pack_codes(ternary.codes), ternary.scale)


def _write_header(writer: Any, model: CheckpointModel) -> None:
    header = model.header
    writer.add_string("general.name", model.checkpoint.folder.resolve().name)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", FILE_TYPES[GGMLType.I2_S])
    for key, value in header.keys().items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{header.arch}.{key}", value)
    if header.rope_factor != 1:
        writer.add_string(f"{header.arch}.rope.scaling.type", "linear")


def _write_tokenizer(writer: Any, tokenizer: TokenizerKeys) -> None:
    writer.add_string("tokenizer.ggml.model", tokenizer.model)
    writer.add_string("tokenizer.ggml.pre", tokenizer.pre or "default")
    writer.add_array("tokenizer.ggml.tokens", list(tokenizer.tokens))
    writer.add_array("tokenizer.ggml.token_type", list(tokenizer.kinds))
    if tokenizer.model == "llama":
        writer.add_array("tokenizer.ggml.scores", list(tokenizer.scores))
        writer.add_bool("tokenizer.ggml.add_space_prefix", tokenizer.add_space_prefix)
    else:
        writer.add_array("tokenizer.ggml.merges", list(tokenizer.merges))
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, **tokenizer.other_ids}
    for name, token_id in roles.items():
        if token_id is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
    writer.add_bool("tokenizer.ggml.add_eos_token", tokenizer.add_eos)
    if tokenizer.chat_template is not None:
        writer.add_string("tokenizer.chat_template", tokenizer.chat_template)
