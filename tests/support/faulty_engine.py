"""The NumPy engine with real-world bugs in some layers, recording only some taps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from crossval.passes import EngineIdentity
from tests.support.numpy_bitnet.engine import TENSORS, Call, Mistake
from tests.support.numpy_bitnet.mistakes import MISTAKES, in_layers, silu, skipped
from tests.support.numpy_bitnet.model import Matrix, Model
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner
from tests.support.numpy_bitnet.styles import PLAIN, Array

ENGINE = replace(PLAIN, name="faulty", weights="weights")


def _gate_and_up_swapped(call: Call) -> Array:
    other = "ffn_up" if call.op == "ffn_gate" else "ffn_gate"
    return call.right(*call.inputs, matrix=call.engine.model.matrix(f"blk.{call.layer}.{other}"))


def _four_codes_in_a_row(call: Call) -> Array:
    right = call.engine.model.matrix(f"blk.{call.layer}.{TENSORS[call.op]}")
    codes = right.packed[..., None] >> np.array([6, 4, 2, 0], np.uint8) & 3
    signs = codes.reshape(right.signs.shape).astype(np.float32) - 1
    return call.right(*call.inputs, matrix=Matrix(signs, right.scale, right.packed))


CODE = {
    "no attention sub-norm": Mistake("", ("attn_sub_norm",), skipped),
    "no feed-forward sub-norm": Mistake("", ("ffn_sub_norm",), skipped),
    "SiLU": Mistake("", ("ffn_act",), silu),
    "gate and up swapped": Mistake("", ("ffn_gate", "ffn_up"), _gate_and_up_swapped),
    "RoPE base 10000": Mistake("", ("q_rope", "k_rope"), lambda call: call.right(*call.inputs, base=10000.0)),
    "no score scale": Mistake("", ("kq_soft_max",), lambda call: call.right(*call.inputs, scale=1.0)),
    "four codes in a row": Mistake("", tuple(TENSORS), _four_codes_in_a_row),
    "LayerNorm": MISTAKES["LayerNorm"],
    "another norm's weight": replace(MISTAKES["another norm's weight"], ops=("attn_norm",)),
    "mask sees the next": MISTAKES["mask sees the next token"],
    "128 levels": MISTAKES["128 levels"],
    "float activations": MISTAKES["float activations"],
    "truncation": MISTAKES["truncation"],
    "no attention residual": Mistake("", ("ffn_inp",), skipped),
    "no feed-forward residual": Mistake("", ("l_out",), skipped),
}
FAULTS = {name: mistake.ops[0] for name, mistake in CODE.items()} | {"gate and up swapped": "ffn_out"}
"""The faults, and the first operation in which an outline shows them."""


class FaultyRunner(NumpyBitnetRunner):
    """An engine wrong in some layers (all unless given) that gives only some taps (all unless given)."""

    identity = EngineIdentity("numpy")

    def __init__(
        self,
        model: Path,
        fault: str | None = None,
        layers: Collection[int] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        mistakes = [] if fault is None else [CODE[fault]]
        if layers is not None:
            mistakes = [in_layers(mistake, sorted(layers)) for mistake in mistakes]
        super().__init__(Model(model), ENGINE, mistakes, keeps=lambda name: only is None or name in only)
