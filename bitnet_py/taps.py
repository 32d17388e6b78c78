"""Names of the intermediate tensors a forward pass can record, and where the C library writes them.

The vocabulary is the harness's (``crossval.model.taps``). The engine must not import the harness,
so the order of the C enum is spelled out here, and a test checks that the two are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py._native import LAYER_NORMS
from bitnet_py.arithmetic import Arithmetic
from bitnet_py.config import ModelConfig
from bitnet_py.errors import InputError
from bitnet_py.weights import Weights

_LAYER_SHAPES = {
    "attn_norm": ("n_tokens", "dim"),
    "attn_q_norm_in": ("n_tokens", "dim"),
    "attn_k_norm_in": ("n_tokens", "dim"),
    "attn_v_norm_in": ("n_tokens", "dim"),
    "q": ("n_tokens", "n_heads", "head_dim"),
    "k": ("n_tokens", "n_kv_heads", "head_dim"),
    "v": ("n_tokens", "n_kv_heads", "head_dim"),
    "q_norm": ("n_tokens", "n_heads", "head_dim"),
    "k_norm": ("n_tokens", "n_kv_heads", "head_dim"),
    "q_rope": ("n_tokens", "n_heads", "head_dim"),
    "k_rope": ("n_tokens", "n_kv_heads", "head_dim"),
    "q_scaled": ("n_tokens", "n_heads", "head_dim"),
    "kq": ("n_heads", "n_tokens", "n_kv"),
    "kq_soft_max": ("n_heads", "n_tokens", "n_kv"),
    "kqv_out": ("n_tokens", "q_dim"),
    "attn_sub_norm": ("n_tokens", "q_dim"),
    "attn_o_out": ("n_tokens", "dim"),
    "attn_post_norm": ("n_rows", "dim"),
    "ffn_inp": ("n_rows", "dim"),
    "ffn_norm": ("n_rows", "dim"),
    "ffn_gate_norm_in": ("n_rows", "dim"),
    "ffn_up_norm_in": ("n_rows", "dim"),
    "ffn_gate": ("n_rows", "hidden_dim"),
    "ffn_up": ("n_rows", "hidden_dim"),
    "ffn_act": ("n_rows", "hidden_dim"),
    "ffn_out": ("n_rows", "hidden_dim"),
    "ffn_sub_norm": ("n_rows", "hidden_dim"),
    "ffn_down": ("n_rows", "dim"),
    "ffn_post_norm": ("n_rows", "dim"),
    "l_out": ("n_rows", "dim"),
}
"""In the order of the enum in csrc/bitnet.h. ``n_rows`` is ``n_tokens``, except in the last layer
``n_outputs``: after ``attn_o_out``, that layer computes only the tokens that get logits."""
_MODEL_SHAPES = {
    "inp_embd": ("n_tokens", "dim"),
    "inp_scaled": ("n_tokens", "dim"),
    "result_norm": ("n_outputs", "dim"),
    "result_output": ("n_outputs", "vocab_size"),
    "pooled": ("n_pooled", "dim"),
}
LAYER_TAPS = tuple(_LAYER_SHAPES)
MODEL_TAPS = tuple(_MODEL_SHAPES)


@dataclass(frozen=True)
class PassShape:
    """The sizes on which the shapes of taps depend."""

    n_tokens: int
    start: int
    n_outputs: int


def slot(name: str, config: ModelConfig) -> int:
    """Return the index of a tap in the C library's pointer table. Raises ``InputError`` for unknown names."""
    if name in MODEL_TAPS:
        return config.n_layers * len(LAYER_TAPS) + MODEL_TAPS.index(name)
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in LAYER_TAPS:
        layer = int(parts[1])
        if layer < config.n_layers:
            return layer * len(LAYER_TAPS) + LAYER_TAPS.index(parts[2])
    raise InputError(f"the model has no tap {name!r}")


def kind(name: str) -> str:
    """Return the name of a tap without its layer."""
    return name.rpartition(".")[2]


def absent(weights: Weights, arithmetic: Arithmetic) -> frozenset[str]:
    """Return the kinds of tap that no pass of a model records: of norms and factors that it has not, and scores
    and their softmax with flash attention.
    """
    layer, config = weights.layers[0], weights.config
    missing = {name for name in LAYER_NORMS if getattr(layer, name) is None}
    if not config.architecture.scales_embedding:
        missing.add("inp_scaled")
    if config.query_scale is None:
        missing.add("q_scaled")
    if arithmetic.flash_attention:
        missing |= {"kq", "kq_soft_max"}
    return frozenset(missing)


def shape(name: str, config: ModelConfig, at: PassShape) -> tuple[int, ...]:
    """Return the shape of a tap in one pass. Raises ``InputError`` for unknown names."""
    layer, which = divmod(slot(name, config), len(LAYER_TAPS))
    dimensions = _MODEL_SHAPES[name] if name in MODEL_TAPS else _LAYER_SHAPES[LAYER_TAPS[which]]
    sizes = {
        "n_tokens": at.n_tokens,
        "n_outputs": at.n_outputs,
        "n_rows": at.n_outputs if layer == config.n_layers - 1 else at.n_tokens,
        "n_kv": at.start + at.n_tokens,
        "n_pooled": 1,
    }
    return tuple(sizes[d] if d in sizes else getattr(config, d) for d in dimensions)


def allocate(
    names: Iterable[str], config: ModelConfig, at: PassShape, missing: Collection[str]
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.uintp]]:
    """Return arrays for the taps that this pass records, and the pointer table for the C library.

    ``missing``: kinds of tap that it does not record.
    """
    table = np.zeros(config.n_layers * len(LAYER_TAPS) + len(MODEL_TAPS), np.uintp)
    arrays = {}
    for name in names:
        index = slot(name, config)
        array = np.empty(shape(name, config, at), np.float32)
        if array.size and kind(name) not in missing:
            arrays[name] = array
            table[index] = array.ctypes.data
    return arrays, table
