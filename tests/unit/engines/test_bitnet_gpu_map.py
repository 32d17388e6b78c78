"""The tap map of the PyTorch model in bitnet.cpp's ``gpu/`` folder, on names and arrays; no PyTorch is needed."""

from __future__ import annotations

import numpy as np
import pytest

from crossval.engines import tap_maps
from crossval.model import taps
from crossval.traces.read import TraceModel
from crossval.traces.tap_map import resolve

SIZES = TraceModel("0" * 64, 2, n_heads=4, n_kv_heads=2, head_dim=4, dim=16, hidden_dim=24, vocab_size=32)
IN_LAYER = (
    "attention_norm", "attention.wqkv", "attention.attn_sub_norm", "attention.attn_sub_norm:input", "attention.wo",
    "ffn_norm", "ffn_norm:input", "feed_forward.w13", "feed_forward.ffn_sub_norm",
    "feed_forward.ffn_sub_norm:input", "feed_forward.w2",
)  # fmt: skip
HIDDEN = {"q_rope", "k_rope", "kq", "kq_soft_max", "ffn_act"}
"""What no module of it computes."""


def names(prefix: str) -> list[str]:
    layers = [f"{prefix}layers.{i}.{name}" for i in range(SIZES.n_layers) for name in IN_LAYER]
    outputs = [f"{prefix}layers.{i}" for i in range(SIZES.n_layers)]
    return [*layers, *outputs, *(f"{prefix}{name}" for name in ("tok_embeddings", "norm", "output"))]


@pytest.mark.parametrize("prefix", ["", "prefill.", "decode."])
def test_its_modules_give_every_tap_that_a_module_computes(prefix: str) -> None:
    found = resolve(names(prefix), tap_maps.load("bitnet-gpu"), "bitnet-b1.58")
    of_2b = {f"blk.{i}.{tap}" for i in range(2) for tap in TAPS_OF_2B if tap not in HIDDEN}
    assert set(found.found) == of_2b | {"inp_embd", "result_norm", "result_output"}
    assert not found.unknown


TAPS_OF_2B = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "kq", "kq_soft_max", "kqv_out", "attn_sub_norm", "attn_o_out",
    "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm", "ffn_down", "l_out",
)  # fmt: skip


def test_fused_matrices_come_apart_and_heads_are_put_in_the_order_of_the_file() -> None:
    found = resolve(names(""), tap_maps.load("bitnet-gpu"), "bitnet-b1.58").found
    qkv = np.arange(3 * 32, dtype=np.float32).reshape(3, 32)  # three tokens: 16 of q, 8 of k, 8 of v

    def tap(name: str, array: np.ndarray, shape: tuple[int, ...]) -> list[float]:
        return found[name][1].apply(array, shape, SIZES)[0].reshape(-1).tolist()

    assert tap("blk.1.q", qkv, (3, 4, 4))[:8] == [0, 2, 1, 3, 4, 6, 5, 7]  # 0 and 1 are rotated together
    assert tap("blk.1.k", qkv, (3, 2, 4)) == [16, 18, 17, 19, 20, 22, 21, 23]
    assert tap("blk.1.v", qkv, (3, 2, 4)) == [24, 25, 26, 27, 28, 29, 30, 31]
    both = np.arange(48, dtype=np.float32)[None]
    assert tap("blk.0.ffn_gate", both, (1, 24)) == list(range(24))
    assert tap("blk.0.ffn_up", both, (1, 24)) == list(range(24, 48))


def test_every_tap_of_the_maps_for_pytorch_exists() -> None:
    for name in ("bitnet-gpu", "huggingface"):
        for entry in tap_maps.load(name).entries:
            assert taps.parse(entry.tap.replace("{i}", "0"))
