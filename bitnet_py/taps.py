"""Names of the intermediate tensors a forward pass can record, and where the C library writes them.

The vocabulary is the harness's (``crossval.model.taps``). The engine must not import the harness,
so the order of the C enum is spelled out here, and a test checks that the two are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.config import ModelConfig
from bitnet_py.errors import InputError

_LAYER_SHAPES = {
    "attn_norm": ("n_tokens", "dim"),
    "q": ("n_tokens", "n_heads", "head_dim"),
    "k": ("n_tokens", "n_kv_heads", "head_dim"),
    "v": ("n_tokens", "n_kv_heads", "head_dim"),
    "q_rope": ("n_tokens", "n_heads", "head_dim"),
    "k_rope": ("n_tokens", "n_kv_heads", "head_dim"),
    "kq": ("n_heads", "n_tokens", "n_kv"),
    "kq_soft_max": ("n_heads", "n_tokens", "n_kv"),
    "kqv_out": ("n_tokens", "q_dim"),
    "attn_sub_norm": ("n_tokens", "q_dim"),
    "attn_o_out": ("n_tokens", "dim"),
    "ffn_inp": ("n_rows", "dim"),
    "ffn_norm": ("n_rows", "dim"),
    "ffn_gate": ("n_rows", "hidden_dim"),
    "ffn_up": ("n_rows", "hidden_dim"),
    "ffn_act": ("n_rows", "hidden_dim"),
    "ffn_out": ("n_rows", "hidden_dim"),
    "ffn_sub_norm": ("n_rows", "hidden_dim"),
    "ffn_down": ("n_rows", "dim"),
    "l_out": ("n_rows", "dim"),
}
"""In the order of the enum in csrc/bitnet.h. ``n_rows`` is ``n_tokens``, except in the last layer
``n_outputs``: from ``ffn_inp`` on, that layer computes only the tokens that get logits."""
_MODEL_SHAPES = {
    "inp_embd": ("n_tokens", "dim"),
    "result_norm": ("n_outputs", "dim"),
    "result_output": ("n_outputs", "vocab_size"),
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


def exists(name: str, config: ModelConfig, *, has_sub_norms: bool, flash_attention: bool = False) -> bool:
    """Return whether a pass records this tap.

    Models without sub-norms lack those taps, flash attention has neither scores nor their softmax.
    """
    slot(name, config)
    if name.endswith("_sub_norm"):
        return has_sub_norms
    return not (flash_attention and name.endswith((".kq", ".kq_soft_max")))


def shape(name: str, config: ModelConfig, at: PassShape) -> tuple[int, ...]:
    """Return the shape of a tap in one pass. Raises ``InputError`` for unknown names."""
    layer, which = divmod(slot(name, config), len(LAYER_TAPS))
    dimensions = _MODEL_SHAPES[name] if name in MODEL_TAPS else _LAYER_SHAPES[LAYER_TAPS[which]]
    sizes = {
        "n_tokens": at.n_tokens,
        "n_outputs": at.n_outputs,
        "n_rows": at.n_outputs if layer == config.n_layers - 1 else at.n_tokens,
        "n_kv": at.start + at.n_tokens,
    }
    return tuple(sizes[d] if d in sizes else getattr(config, d) for d in dimensions)


def allocate(
    names: Iterable[str],
    config: ModelConfig,
    at: PassShape,
    *,
    has_sub_norms: bool,
    flash_attention: bool = False,
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.uintp]]:
    """Return arrays for the taps that this pass records, and the pointer table for the C library."""
    table = np.zeros(config.n_layers * len(LAYER_TAPS) + len(MODEL_TAPS), np.uintp)
    arrays = {}
    for name in names:
        if exists(name, config, has_sub_norms=has_sub_norms, flash_attention=flash_attention):
            array = np.empty(shape(name, config, at), np.float32)
            if array.size:
                arrays[name] = array
                table[slot(name, config)] = array.ctypes.data
    return arrays, table
