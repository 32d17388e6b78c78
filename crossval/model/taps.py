"""Taps: the shared vocabulary of intermediate tensors, in execution order.

Names follow bitnet.cpp's graph callback names made unique (``Qcur-0`` appears there twice: before RoPE it
is ``q``, after it ``q_rope``). A full name is ``blk.{layer}.{tap}`` for layer taps and the bare tap name for
the model-wide ones. All arrays are float32, C-contiguous:

=================  =============================================
taps               shape
=================  =============================================
``q q_rope``       ``(n_tokens, n_heads, head_dim)``
``k k_rope v``     ``(n_tokens, n_kv_heads, head_dim)``
``kq kq_soft_max`` ``(n_heads, n_tokens, n_kv)``, padding removed
all others         ``(n_tokens, features)``
=================  =============================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

LAYER_TAPS: tuple[str, ...] = (
    "attn_norm",
    "q",
    "k",
    "v",
    "q_rope",
    "k_rope",
    "kq",
    "kq_soft_max",
    "kqv_out",
    "attn_sub_norm",
    "attn_o_out",
    "ffn_inp",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_act",
    "ffn_out",
    "ffn_sub_norm",
    "ffn_down",
    "l_out",
)
"""Taps of one layer in execution order (the specification's order; engines may interleave q, k and v)."""

HEAD_TAPS: tuple[str, ...] = ("result_norm", "result_output")
INPUT_TAPS: tuple[str, ...] = ("inp_embd",)

MODEL_DEPENDENT_TAPS = frozenset({"attn_sub_norm", "ffn_sub_norm"})
"""Taps of tensors a model may lack; when neither engine has one, nothing is missing."""

SCORES = ("kq", "kq_soft_max")
"""Taps whose axes are head, token and key."""
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\Z")


@dataclass(frozen=True, order=True)
class TapName:
    """A parsed full tap name; ``layer`` is None for model-wide taps."""

    layer: int | None
    tap: str

    def __str__(self) -> str:
        return self.tap if self.layer is None else f"blk.{self.layer}.{self.tap}"


@lru_cache(maxsize=4096)
def parse(name: str) -> TapName:
    """Parse a full tap name.

    Raises:
        ValueError: the name is not in the vocabulary.
    """
    if name in INPUT_TAPS or name in HEAD_TAPS:
        return TapName(None, name)
    match = _LAYER_NAME.match(name)
    if match is None or match.group(2) not in LAYER_TAPS:
        raise ValueError(f"unknown tap name {name!r}")
    return TapName(int(match.group(1)), match.group(2))


def layer_taps(layer: int) -> list[str]:
    """Return the full names of every tap of one layer, in execution order."""
    return [f"blk.{layer}.{tap}" for tap in LAYER_TAPS]


def all_taps(n_layers: int) -> list[str]:
    """Return the full names of every tap of a model, in execution order."""
    names = list(INPUT_TAPS)
    for layer in range(n_layers):
        names += layer_taps(layer)
    return names + list(HEAD_TAPS)


def outline_taps(n_layers: int) -> list[str]:
    """Return the coarse selection: embedding, every layer's output, final norm and logits."""
    return [*INPUT_TAPS, *(f"blk.{layer}.l_out" for layer in range(n_layers)), *HEAD_TAPS]


def execution_index(name: str, n_layers: int) -> int:
    """Return the position of a tap in execution order, for sorting and for finding the first divergence."""
    tap = parse(name)
    if tap.tap in INPUT_TAPS:
        return 0
    if tap.layer is None:
        return 1 + n_layers * len(LAYER_TAPS) + HEAD_TAPS.index(tap.tap)
    return 1 + tap.layer * len(LAYER_TAPS) + LAYER_TAPS.index(tap.tap)


def token_axis(name: str) -> int:
    """Return the axis of a tap that counts tokens."""
    return 1 if parse(name).tap in SCORES else 0


def shape_hint(
    name: str, shape: Sequence[int], expected: Sequence[int], keys_of: Mapping[int, int] | None = None
) -> str:
    """Return what to do about a tap's shape, empty when nothing can be told.

    ``keys_of``: how many keys the other passes see, by their index.
    """
    if len(shape) == len(expected) == 3 and parse(name).tap in SCORES and shape[:2] == expected[:2]:
        return _keys_hint(shape[2], expected[2], keys_of or {})
    if sorted(shape) == sorted(expected):
        return f"the axes are in another order: write ({', '.join(_axes_of(name))}), the last running fastest"
    if math.prod(shape) == math.prod(expected):
        return f"it holds as many values: give it the shape [{', '.join(map(str, expected))}]"
    return ""


def _keys_hint(found: int, expected: int, keys_of: Mapping[int, int]) -> str:
    """Explain attention scores over another number of keys than the tokens so far."""
    alike = [index for index, n_keys in keys_of.items() if n_keys == found]
    other = f"; pass {alike[0]} sees {found} keys: are the passes in another order?" if alike else ""
    if found < expected:
        return f"it has {found} keys, the tokens so far are {expected}: cells of the KV cache are missing{other}"
    cells = "one cell" if found == expected + 1 else f"{found - expected} cells"
    return (
        f"it has {found} keys, the tokens so far are {expected}: the KV cache is padded or holds {cells} more; "
        f"cut the last axis to the cells of positions 0 to {expected - 1} (array[:, :, :{expected}]){other}"
    )


def _axes_of(name: str) -> tuple[str, ...]:
    tap = parse(name).tap
    if tap in SCORES:
        return "head", "token", "key"
    return ("token", "head", "feature") if tap in ("q", "q_rope", "k", "k_rope", "v") else ("token", "feature")
