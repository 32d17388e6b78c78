"""Build transformers' model from a GGUF file: configuration and weights are the file's, the arithmetic is theirs.

Weights are decoded by the specification's reader. Ternary matrices become ``BitLinear`` (class ``bitlinear``:
packed codes, int8 activations, one division) or ``AutoBitLinear`` (``autobitlinear``, offline: activations are
quantised and dequantised before a product in floating point), as published checkpoints of either family have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BitNetConfig, BitNetForCausalLM, BitNetQuantConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import pack_weights, replace_with_bitnet_linear

from crossval.errors import UnavailableError
from crossval.model.config import SpecConfig
from crossval.model.kinds import TernaryMatrix
from crossval.model.weights import SpecWeights
from crossval.traces.tap_map import WORDS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HEAD = "lm_head"
_BITNET, _LLAMA = (BitNetConfig, BitNetForCausalLM), (LlamaConfig, LlamaForCausalLM)
_CLASSES = {"bitnet-b1.58": _BITNET, "bitnet-25": _BITNET, "bitnet": _BITNET, "llama": _LLAMA}
_LINEAR_CLASS = {"llama": "bitlinear"}
"""What checkpoints of an architecture are published with; ``autobitlinear`` where it is not listed."""
_ACTIVATIONS = {"relu_squared": "relu2", "silu": "silu"}
_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SUB_NORMS = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}


def from_gguf(path: str | Path, dtype: str = "f32", linear_class: str | None = None) -> Any:
    """Return the model, in evaluation mode, its parameters in ``dtype``.

    ``dtype``: ``f32``, ``bf16`` or ``f16``. ``linear_class``: ``bitlinear`` or ``autobitlinear``; None: that of
    published checkpoints of the architecture.

    Raises:
        BadInputError: the file is not a model that the specification defines.
        UnavailableError: transformers has no such model.
    """
    weights = SpecWeights(path)
    config, chosen = weights.config, linear_class or linear_class_of(weights.config.architecture)
    _check(config, chosen)
    config_class, model_class = _CLASSES[config.architecture]
    theirs = config_class(**_fields(config))
    theirs._attn_implementation = "eager"  # the only one whose attention weights are a module's result
    with torch.device("meta"), _default_dtype(DTYPES[dtype]):
        model = model_class(theirs)
        replace_with_bitnet_linear(
            model, [HEAD], BitNetQuantConfig(linear_class=chosen, quantization_mode="offline")
        )
    state = dict(_state(weights, DTYPES[dtype], chosen))
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=theirs)  # its table is no part of the state
    return model.requires_grad_(False).eval()


def linear_class_of(architecture: str) -> str:
    """Return the class of ternary matrices in published checkpoints of an architecture."""
    return _LINEAR_CLASS.get(architecture, "autobitlinear")


def _check(config: SpecConfig, linear_class: str) -> None:
    def missing(what: str) -> UnavailableError:
        return UnavailableError(f"transformers {what}; compare with another reference, such as spec")

    if config.architecture not in _CLASSES:
        raise missing(f"has no model for architecture {config.architecture!r} with ternary weights")
    is_bitnet = _CLASSES[config.architecture] is _BITNET
    if is_bitnet != config.attn_sub_norm or is_bitnet != config.ffn_sub_norm:
        raise missing(f"{'has always' if is_bitnet else 'does not have'} sub-norms in this architecture")
    if is_bitnet and config.n_heads * config.head_dim != config.dim:
        raise missing("norms BitNet's attention output in the width of the model, which is not that of its heads")
    if config.rope_factors:
        raise missing("has no rotary embedding with divisors of its own (rope_freqs.weight)")
    if config.biases and linear_class == "autobitlinear":
        raise missing("multiplies the bias of class autobitlinear by the weight's scale, too")


def _fields(config: SpecConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scale != 1:
        rope |= {"rope_type": "linear", "factor": 1 / config.rope_scale}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": bool(config.biases),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _state(weights: SpecWeights, dtype: torch.dtype, linear_class: str) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and buffers by transformers' names."""
    config = weights.config
    embedding = _tensor(weights["token_embd.weight"], dtype)
    yield "model.embed_tokens.weight", embedding
    yield f"{HEAD}.weight", embedding if config.tied_head else _tensor(weights["output.weight"], dtype)
    yield "model.norm.weight", _tensor(weights["output_norm.weight"], dtype)
    norms = {**_NORMS, **(_SUB_NORMS if config.attn_sub_norm else {})}
    for i in range(config.n_layers):
        for ours, theirs in norms.items():
            yield f"model.layers.{i}.{theirs}.weight", _tensor(weights[f"blk.{i}.{ours}.weight"], dtype)
        for ours, theirs in _MATRICES.items():
            matrix, order = weights[f"blk.{i}.{ours}.weight"], _row_order(config, ours)
            assert isinstance(matrix, TernaryMatrix)
            signs = torch.from_numpy(matrix.signs[order])
            packed = linear_class == "bitlinear"
            scale = 1 / np.float32(matrix.scale) if packed else np.float32(matrix.scale)
            name = f"model.layers.{i}.{theirs}"
            yield f"{name}.weight", pack_weights(signs) if packed else signs.to(dtype)
            yield f"{name}.weight_scale", torch.tensor([float(scale)], dtype=dtype)
            if config.biases and ours.startswith("attn"):
                has_it = ours in config.biases
                bias = weights[f"blk.{i}.{ours}.bias"] if has_it else np.zeros(len(signs))
                yield f"{name}.bias", _tensor(np.asarray(bias)[order], dtype)


def _row_order(config: SpecConfig, matrix: str) -> Any:
    """Return which row of a GGUF's matrix is which of transformers': its heads are rotated in halves."""
    if matrix not in ("attn_q", "attn_k") or config.rope_pairing == "halves":
        return slice(None)
    n_heads = config.n_heads if matrix == "attn_q" else config.n_kv_heads
    rows = np.arange(n_heads * config.head_dim).reshape(n_heads, config.head_dim)
    return WORDS["rope_adjacent_to_halves"](rows, config).reshape(-1)


def _tensor(values: Any, dtype: torch.dtype) -> Any:
    wide: npt.NDArray[np.float32] = np.array(values, dtype=np.float32)
    return torch.from_numpy(wide).to(dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
