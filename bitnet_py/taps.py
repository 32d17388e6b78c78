"""Names of the intermediate tensors a forward pass can record, and where the C library writes them.

The vocabulary is the harness's (``crossval.model.taps``); the engine must not import the harness, so the order
of the C enum is spelled out here and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.config import ModelConfig
from bitnet_py.errors import InputError

LAYER_TAPS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "kq", "kq_soft_max", "kqv_out", "attn_sub_norm", "attn_o_out",
    "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm", "ffn_down", "l_out",
)  # fmt: skip
"""In the order of the enum in csrc/bitnet.h."""
MODEL_TAPS = ("inp_embd", "result_norm", "result_output")

_FIRST_ROW_TAP = LAYER_TAPS.index("ffn_inp")
_HIDDEN = {"ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm"}


@dataclass(frozen=True)
class PassShape:
    """What the shapes of taps depend on."""

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


def exists(name: str, config: ModelConfig, *, has_sub_norms: bool) -> bool:
    """Return whether a pass records this tap: models without sub-norms lack those taps."""
    slot(name, config)
    return has_sub_norms or not name.endswith("_sub_norm")


def shape(name: str, config: ModelConfig, at: PassShape) -> tuple[int, ...]:
    """Return the shape of a tap in one pass; from ``ffn_inp`` of the last layer on only output rows exist."""
    index = slot(name, config)
    layer, which = divmod(index, len(LAYER_TAPS))
    if layer == config.n_layers:
        tap = MODEL_TAPS[which]
        if tap == "inp_embd":
            return (at.n_tokens, config.dim)
        return (at.n_outputs, config.dim if tap == "result_norm" else config.vocab_size)
    tap = LAYER_TAPS[which]
    if tap in ("kq", "kq_soft_max"):
        return (config.n_heads, at.n_tokens, at.start + at.n_tokens)
    if tap in ("q", "q_rope"):
        return (at.n_tokens, config.n_heads, config.head_dim)
    if tap in ("k", "k_rope", "v"):
        return (at.n_tokens, config.n_kv_heads, config.head_dim)
    gathered = layer == config.n_layers - 1 and which >= _FIRST_ROW_TAP
    return (at.n_outputs if gathered else at.n_tokens, config.hidden_dim if tap in _HIDDEN else config.dim)


def allocate(
    names: Iterable[str], config: ModelConfig, at: PassShape, *, has_sub_norms: bool
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.uintp]]:
    """Return arrays for the taps that this pass records, and the pointer table for the C library."""
    table = np.zeros(config.n_layers * len(LAYER_TAPS) + len(MODEL_TAPS), np.uintp)
    arrays = {}
    for name in names:
        if exists(name, config, has_sub_norms=has_sub_norms):
            array = np.empty(shape(name, config, at), np.float32)
            if array.size:
                arrays[name] = array
                table[slot(name, config)] = array.ctypes.data
    return arrays, table
