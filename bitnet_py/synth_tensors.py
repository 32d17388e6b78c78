"""The tensors of a synthetic model: which there are, and their seeded random values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from bitnet_py.config import ARCHITECTURES
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType
from bitnet_py.projections import ternary_tensor
from bitnet_py.quants import pack_codes
from bitnet_py.synth_config import NORMS, SynthConfig
from bitnet_py.synth_random import Stream
from bitnet_py.tables import TABLES
from bitnet_py.weights import INPUT_NORMS, SUB_NORMS

_RESIDUAL_RMS = 2.0
_LOGIT_STD = 3.0
_PROJECTION_RMS = {"attn_q": 1.3, "attn_k": 1.3, "attn_v": 1.0, "ffn_gate": 1.0, "ffn_up": 1.0}
_CODES = np.repeat(np.array([0, 1, 2], np.uint8), [77, 102, 77])
"""Code of each byte value: 30 % -1, 40 % 0, 30 % +1."""
_NONZERO = 154 / 256
_BIAS_RMS = 0.3
"""Of a bias, over that of the products it is added to."""
_RANDOM_BLOCKS = {GGMLType.Q6_K: (208, 18.5 * 73.9), GGMLType.Q3_K: (108, 2.35 * 18.5)}
"""Byte of the float16 in a block, and RMS of code times scale where all other bits are random."""


@dataclass(frozen=True)
class Plan:
    """One tensor to write: its place in the file and the typical size of its values."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    rms: float = 1.0
    """RMS of the outputs for a unit-RMS input (ternary matrices), or of the values (tables)."""


def _norms(config: SynthConfig) -> Iterator[tuple[str, int]]:
    """Yield name and width of the norms of a layer."""
    known, dim, hidden_dim, head_dim = ARCHITECTURES[config.arch], config.dim, config.hidden_dim, config.head_size
    yield from (("attn_norm", dim), ("ffn_norm", dim))
    own = {"attn_sub_norm": config.n_heads * head_dim, "ffn_sub_norm": hidden_dim}
    if config.sub_norms:
        names = INPUT_NORMS if known.input_norms else SUB_NORMS if known.sub_norms else {}
        yield from ((name, own.get(field, dim)) for field, name in names.items())
    if known.head_norms:
        yield from (("attn_q_norm", head_dim), ("attn_k_norm", head_dim))
    if known.post_norms:
        yield from (("post_attention_norm", dim), ("post_ffw_norm", dim))


def plans(config: SynthConfig) -> Iterator[Plan]:
    """Yield the tensors in file order."""
    dim, hidden_dim = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    embedding_rms = _LOGIT_STD / math.sqrt(dim)
    branch_rms = _RESIDUAL_RMS / math.sqrt(2 * config.n_layers)
    yield Plan("token_embd.weight", TABLES[config.embedding], (config.vocab_size, dim), embedding_rms)
    for layer in range(config.n_layers):
        for name, width in _norms(config):
            yield Plan(f"blk.{layer}.{name}.weight", NORMS[config.norms], (width,))
        for name, rows, cols in (
            ("attn_q", q_dim, dim),
            ("attn_k", kv_dim, dim),
            ("attn_v", kv_dim, dim),
            ("attn_output", dim, q_dim),
            ("ffn_gate", hidden_dim, dim),
            ("ffn_up", hidden_dim, dim),
            ("ffn_down", dim, hidden_dim),
        ):
            rms = _PROJECTION_RMS.get(name, branch_rms)
            yield Plan(f"blk.{layer}.{name}.weight", config.projection_type, (rows, cols), rms)
            if config.scales:
                yield Plan(f"blk.{layer}.{name}.scale", GGMLType.F32, (1,))
            if config.biases and name.startswith("attn_"):
                yield Plan(f"blk.{layer}.{name}.bias", GGMLType.F32, (rows,), _BIAS_RMS * rms)
    if config.rope_freqs:
        yield Plan("rope_freqs.weight", GGMLType.F32, (config.head_size // 2,))
    yield Plan("output_norm.weight", NORMS[config.norms], (dim,))
    if config.untied_head or config.head is not None:
        yield Plan(
            "output.weight", TABLES[config.head or config.embedding], (config.vocab_size, dim), embedding_rms
        )


def _f16_matrix(plan: Plan, stream: Stream) -> npt.NDArray[np.float16]:
    """Return values of the sum of two uniform variables, chunk by chunk to bound memory."""
    rows, cols = plan.shape
    out = np.empty((rows, cols), np.float16)
    step = max(1, (1 << 22) // cols)
    # A uniform 16-bit integer has variance 2^32 / 12; exact float32 values up to one rounding.
    unit = np.float32(plan.rms * math.sqrt(6) / 65536)
    for start in range(0, rows, step):
        n_rows = min(step, rows - start)
        pairs = stream.uint16(2 * n_rows * cols).reshape(2, n_rows, cols).astype(np.int32)
        out[start : start + n_rows] = ((pairs[0] + pairs[1] - 65535).astype(np.float32) * unit).astype(np.float16)
    return out


def _norm(plan: Plan, stream: Stream) -> npt.NDArray[np.floating[Any]]:
    """Return weights spread evenly over 0.5 .. 1.5, all exact in float32."""
    fraction: npt.NDArray[np.float32] = stream.uint16(plan.shape[0]).astype(np.float32) / np.float32(65536)
    fraction += np.float32(0.5)
    return fraction if plan.type is GGMLType.F32 else fraction.astype(np.float16)


def _bias(plan: Plan, stream: Stream) -> npt.NDArray[np.float32]:
    """Return values spread evenly around 0."""
    values: npt.NDArray[np.float32] = stream.uint16(plan.shape[0]).astype(np.float32) - np.float32(32767.5)
    values *= np.float32(plan.rms * math.sqrt(12) / 65536)
    return values


def _rope_factors(plan: Plan, stream: Stream) -> npt.NDArray[np.float32]:
    """Return divisors from 1 to 8, rising with the pair, as those of Llama 3.1 do."""
    rise = np.sort(stream.uint16(plan.shape[0])).astype(np.float32) / np.float32(65536)
    factors: npt.NDArray[np.float32] = np.float32(1) + np.float32(7) * rise
    return factors


def _ternary(plan: Plan, stream: Stream) -> npt.NDArray[np.uint8]:
    """Return the bytes of a ternary tensor whose scale is its own: within 20 % of what gives ``plan.rms``."""
    rows, cols = plan.shape
    jitter = 0.8 + 0.4 * stream.below(1 << 16) / (1 << 16)
    scale = jitter * plan.rms / math.sqrt(_NONZERO * cols)
    codes = _CODES[stream.bytes(rows * cols)].reshape(rows, cols)
    return ternary_tensor(pack_codes(codes), scale, plan.type)


def _table(plan: Plan, stream: Stream) -> npt.NDArray[Any]:
    """Return the rows of an embedding or a head: the values of ``_f16_matrix``, rounded to another type.

    Types that the ``gguf`` package cannot write get random codes and scales instead, of the same typical size.
    """
    if plan.type in _RANDOM_BLOCKS:
        return _random_blocks(plan, stream)
    values = _f16_matrix(plan, stream)
    if plan.type is GGMLType.F16:
        return values
    kind = gguf.GGMLQuantizationType(int(plan.type))
    step = max(1, (1 << 22) // values.shape[1])
    parts = [gguf.quantize(values[i : i + step].astype(np.float32), kind) for i in range(0, len(values), step)]
    return np.concatenate(parts)


def _random_blocks(plan: Plan, stream: Stream) -> npt.NDArray[np.uint8]:
    rows, cols = plan.shape
    elements, size_bytes = BLOCK_LAYOUT[plan.type]
    n_blocks, (at, spread) = cols // elements, _RANDOM_BLOCKS[plan.type]
    out = stream.bytes(rows * n_blocks * size_bytes).reshape(rows, n_blocks, size_bytes)
    jitter = 0.8 + 0.4 * stream.uint16(rows * n_blocks).astype(np.float32).reshape(rows, n_blocks, 1) / 65536
    out[..., at : at + 2] = (jitter * np.float32(plan.rms / spread)).astype("<f2").view(np.uint8)
    return out.reshape(rows, -1)


def tensor(plan: Plan, seed: int) -> npt.NDArray[Any]:
    """Return the values of a tensor, or the bytes of its blocks."""
    stream = Stream(seed, plan.name)
    if plan.name in ("token_embd.weight", "output.weight"):
        return _table(plan, stream)
    if plan.name.endswith(".bias"):
        return _bias(plan, stream)
    if plan.name == "rope_freqs.weight":
        return _rope_factors(plan, stream)
    return _ternary(plan, stream) if len(plan.shape) == 2 else _norm(plan, stream)
