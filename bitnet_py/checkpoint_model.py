"""A Hugging Face checkpoint as the model that a GGUF of it should hold: tensor by tensor, under GGUF names.

Families: ``BitNetForCausalLM`` (2B-4T), ``BitnetForCausalLM`` (1bitLLM), ``LlamaForCausalLM``
(Llama3-8B-1.58, Falcon3, Falcon-E). Rows of Q and K are reordered where the GGUF's architecture
rotates adjacent elements, because checkpoints rotate halves (llama.cpp convert_hf_to_gguf.py
``permute``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_py.checkpoint import Checkpoint
from bitnet_py.checkpoint_config import Header, read_header
from bitnet_py.errors import ModelError, clip, model_error
from bitnet_py.ternarise import Ternary, absmean, convention_of, unpacked

Role = Literal["matrix", "norm", "table"]
_CONVERT = "this checkpoint cannot be converted"
_IGNORED = ("rotary_emb.inv_freq",)
_TABLE_ROWS = 2048


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one class of models name their tensors."""

    attn_sub_norm: str | None
    ffn_sub_norm: str | None
    permuted: bool
    """Whether rows of Q and K are in another order in the GGUF."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "BitNetForCausalLM": Family("self_attn.attn_sub_norm", "mlp.ffn_sub_norm", permuted=False),
        "BitnetForCausalLM": Family("self_attn.inner_attn_ln", "mlp.ffn_layernorm", permuted=False),
        "LlamaForCausalLM": Family(None, None, permuted=True),
    }
)
"""First of ``architectures`` in config.json -> family."""


@dataclass(frozen=True)
class Source:
    """One tensor of the GGUF, and where the checkpoint has it."""

    target: str
    """Name in the GGUF."""
    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """In the GGUF, NumPy order."""
    role: Role
    permuted_heads: int | None = None
    """Number of heads whose rows are reordered."""


class CheckpointModel:
    """An open checkpoint of a known family; values are read when asked for."""

    def __init__(self, checkpoint: Checkpoint, header: Header, sources: tuple[Source, ...], tied: bool) -> None:
        self.checkpoint = checkpoint
        self.header = header
        self.sources = sources
        """In the order of the graph."""
        self.tied = tied
        """Whether the LM head is the embedding."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CheckpointModel:
        """Open a checkpoint and check names, types and shapes of all its tensors.

        Raises:
            ModelError: an unusable checkpoint, or one of another kind.
        """
        checkpoint = Checkpoint.open(path)
        try:
            names = checkpoint.config.get("architectures")
            name = str(names[0]) if isinstance(names, list) and names else "none"
            if name not in FAMILIES:
                raise _error(checkpoint, "architectures", " or ".join(FAMILIES), clip(name))
            header = read_header(checkpoint.config, checkpoint.folder, halves=not FAMILIES[name].permuted)
            tied = _is_tied(checkpoint)
            sources = tuple(_sources(header, FAMILIES[name], tied=tied))
            _check(checkpoint, sources)
        except BaseException:
            checkpoint.close()
            raise
        return cls(checkpoint, header, sources, tied)

    def ternary(self, source: Source) -> Ternary:
        """Return a matrix's codes, rows in the order of the GGUF, and scale.

        Raises:
            ModelError: values that cannot be quantised.
        """
        held = self.checkpoint
        try:
            values = held.tensor(source.name)
            if f"{source.name}_scale" in held:
                scale = held.tensor(f"{source.name}_scale")
                found = unpacked(values, scale, convention_of(held.config))
            else:
                found = Ternary(*absmean(values), held.dtype(source.name))
        except ModelError as error:
            raise ModelError(f"{held.folder}: tensor {source.name}: {error}") from None
        if source.permuted_heads is None:
            return found
        return Ternary(permute(found.codes, source.permuted_heads), found.scale, found.dtype)

    def norm(self, source: Source) -> npt.NDArray[np.float32]:
        """Return the weights of a norm.

        Raises:
            ModelError: NaN or infinity.
        """
        values = self.checkpoint.tensor(source.name).astype(np.float32)
        if not np.isfinite(values).all():
            raise _error(self.checkpoint, f"tensor {source.name}", "finite values", "NaN or infinity")
        return values

    def table(self, source: Source) -> Iterator[npt.NDArray[np.float16]]:
        """Yield the embedding or head in float16, some rows at a time.

        Raises:
            ModelError: a value that float16 does not hold.
        """
        for first in range(0, source.shape[0], _TABLE_ROWS):
            rows = self.checkpoint.rows(source.name, slice(first, min(first + _TABLE_ROWS, source.shape[0])))
            with np.errstate(over="ignore"):
                narrow = rows.astype(np.float16)
            if not np.isfinite(narrow).all():
                what = f"tensor {source.name}, rows {first} to {first + len(rows) - 1}"
                raise _error(self.checkpoint, what, "values that float16 holds", "NaN, infinity or larger ones")
            yield narrow

    def close(self) -> None:
        """Release the checkpoint's files."""
        self.checkpoint.close()

    def __enter__(self) -> CheckpointModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def permute(rows: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
    """Reorder the rows of Q or K of each head from rotated halves to neighbours: i, i + h/2 -> 2i, 2i + 1."""
    halves = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def unpermute(rows: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
    """Undo ``permute``."""
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _is_tied(checkpoint: Checkpoint) -> bool:
    stated, has_head = checkpoint.config.get("tie_word_embeddings"), "lm_head.weight" in checkpoint
    if stated is False and not has_head:
        raise _error(checkpoint, "tensor lm_head.weight", "it (tie_word_embeddings is false)", "no such tensor")
    return not has_head if stated is None else bool(stated)


def _sources(header: Header, family: Family, *, tied: bool) -> Iterator[Source]:
    dim, hidden, vocab = header.dim, header.hidden_dim, header.vocab_size
    q_dim, kv_dim = header.n_heads * header.head_dim, header.n_kv_heads * header.head_dim
    yield Source("token_embd.weight", "model.embed_tokens.weight", (vocab, dim), "table")
    for index in range(header.n_layers):
        norms = [("attn_norm", "input_layernorm", dim), ("ffn_norm", "post_attention_layernorm", dim)]
        if family.attn_sub_norm is not None and family.ffn_sub_norm is not None:
            norms += [
                ("attn_sub_norm", family.attn_sub_norm, q_dim),
                ("ffn_sub_norm", family.ffn_sub_norm, hidden),
            ]
        for target, name, width in norms:
            yield Source(f"blk.{index}.{target}.weight", f"model.layers.{index}.{name}.weight", (width,), "norm")
        for target, name, rows, cols, heads in (
            ("attn_q", "self_attn.q_proj", q_dim, dim, header.n_heads),
            ("attn_k", "self_attn.k_proj", kv_dim, dim, header.n_kv_heads),
            ("attn_v", "self_attn.v_proj", kv_dim, dim, None),
            ("attn_output", "self_attn.o_proj", dim, q_dim, None),
            ("ffn_gate", "mlp.gate_proj", hidden, dim, None),
            ("ffn_up", "mlp.up_proj", hidden, dim, None),
            ("ffn_down", "mlp.down_proj", dim, hidden, None),
        ):
            yield Source(
                f"blk.{index}.{target}.weight",
                f"model.layers.{index}.{name}.weight",
                (rows, cols),
                "matrix",
                heads if family.permuted else None,
            )
    yield Source("output_norm.weight", "model.norm.weight", (dim,), "norm")
    if not tied:
        yield Source("output.weight", "lm_head.weight", (vocab, dim), "table")


def _check(checkpoint: Checkpoint, sources: tuple[Source, ...]) -> None:
    """Require every tensor with its shape and a usable type, and no other tensor."""
    left = {name for name in checkpoint.files if not name.endswith(_IGNORED)} - {"lm_head.weight"}
    for source in sources:
        scale = f"{source.name}_scale"
        left -= {source.name, scale} if source.role == "matrix" else {source.name}
        packed = source.role == "matrix" and scale in checkpoint
        expected = (source.shape[0] // 4, *source.shape[1:]) if packed else source.shape
        found, dtype = checkpoint.shape(source.name), checkpoint.dtype(source.name)
        if found != expected:
            raise _error(checkpoint, f"tensor {source.name}, shape", expected, found)
        if (dtype == "uint8") != packed or dtype == "int8":
            wanted = f"uint8 (it has {scale})" if packed else "a float type"
            raise _error(checkpoint, f"tensor {source.name}, type", wanted, dtype)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise _error(checkpoint, "tensors", "only those of the model", f"{clip(min(left))}{more}")


def _error(checkpoint: Checkpoint, what: str, expected: object, found: object) -> ModelError:
    return model_error(checkpoint.folder, what, expected=expected, found=found, remedy=_CONVERT)
